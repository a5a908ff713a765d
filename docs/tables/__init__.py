"""The tables of the pages, made from committed results: ``{include} _generated/NAME.md`` where a page shows one.

Each file here returns, from ``tables()``, its tables by name.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def results(name: str) -> dict[str, Any]:
    """Return ``benchmarks/results/NAME.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_all(folder: Path) -> None:
    """Write every table of this package as ``NAME.md``."""
    folder.mkdir(exist_ok=True)
    for found in pkgutil.iter_modules(__path__):
        for name, text in import_module(f"{__name__}.{found.name}").tables().items():
            (folder / f"{name}.md").write_text(text + "\n")
