"""Checks of means and errors of random estimates, and broken samplers that the checks must reject."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_bilevel.directions import DirectionSampler, Gaussian, Key


def check_mean(samples: Tensor, exact: Tensor, rounding: Tensor | float = 0.0) -> None:
    """Compare the mean with ``exact``, entry by entry, within four standard errors.

    Args:
        samples: independent estimates, one a row.
        exact: what they are estimates of.
        rounding: of one mean, which adds to its standard error.
    """
    error = (samples.mean(0) - exact).abs()
    spread = samples.std(0) / len(samples) ** 0.5 + rounding
    assert (error <= 4 * spread).all(), f"the mean is off by {(error / spread).max():.1f} standard errors"


def check_error(samples: Tensor, exact: Tensor, documented: float) -> None:
    """Compare E‖ĝ − g‖² / ‖g‖² of the rows with the documented value, within a tenth of it."""
    measured = ((samples - exact).square().sum(1).mean() / exact.square().sum()).item()
    expected = pytest.approx(documented, rel=0.1, abs=1e-12)
    assert measured == expected, f"error {measured:.4f}, documented {documented:.4f}"


class UnitLength(DirectionSampler):
    """Broken: directions of length 1, not √N."""

    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        return torch.nn.functional.normalize(Gaussian().flat(key, start, stop, like))
