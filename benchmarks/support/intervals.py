"""Means over seeds, with intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the values, their mean, and half the width of its 95% interval by Student's t; ``None`` for one value."""
    half = None
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return {"values": list(values), "mean": statistics.fmean(values), "half_width": half}
