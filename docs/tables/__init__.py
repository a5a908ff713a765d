"""The tables of the pages, made from committed results: ``{include} _generated/NAME.md`` where a page shows one.

Each file here returns, from ``tables()``, its tables by name. The reports in ``benchmarks/results/`` hold theirs
between ``<!-- table: FILE/NAME -->`` and ``<!-- end -->``; ``cd docs && python -m tables`` writes these anew.
"""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Sequence
from importlib import import_module
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy import stats

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- table: (\w+)/(\w+) -->\n).*?(<!-- end -->)", re.S)


def results(name: str) -> dict[str, Any]:
    """Return ``benchmarks/results/NAME.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def filled(report: str) -> str:
    """Return a report with its tables as the results are now."""

    def table(place: re.Match[str]) -> str:
        begin, file, name, end = place.groups()
        return f"{begin}\n{import_module(f'{__name__}.{file}').tables()[name]}\n\n{end}"

    return PLACE.sub(table, report)


def half_width(values: Sequence[float]) -> float:
    """Return half of the 95% interval of the mean of one number per seed."""
    return stats.t.ppf(0.975, len(values) - 1) * stdev(values) / sqrt(len(values))


def interval(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean of one number per seed and its 95% interval."""
    return f"{mean(values):.{digits}f} ± {half_width(values):.{digits}f}"


def difference(ours: Sequence[float], others: Sequence[float], digits: int = 1) -> str:
    """Return the mean difference of two runs of each seed and its 95% interval."""
    pairs = [a - b for a, b in zip(ours, others, strict=True)]
    return f"{mean(pairs):+.{digits}f} ± {half_width(pairs):.{digits}f}"


def write_all(folder: Path) -> None:
    """Write every table of this package as ``NAME.md``."""
    folder.mkdir(exist_ok=True)
    for found in pkgutil.iter_modules(__path__):
        if found.name == "__main__":
            continue
        for name, text in import_module(f"{__name__}.{found.name}").tables().items():
            (folder / f"{name}.md").write_text(text + "\n")
