"""What the examples share: their options, their results on the screen and on disk, and the look of their figures."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

try:
    import resource
except ImportError:  # Windows
    resource = None

# Colours of Okabe and Ito, which are told apart with any kind of colour vision; grey is for what is compared with.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"

ADVICE = (
    "GPU available but not used",
    "The '.*' does not have many workers",
    "Experiment logs directory .* exists and is not empty",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
)
"""What Lightning says that is no news to someone who runs an example twice on a small machine."""

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#B0B0B0",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.color": "#EBEBEB",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "savefig.dpi": 160,
}


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every example, which shows ``description`` as it is written."""

    def layout(prog: str) -> argparse.HelpFormatter:
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110)

    parser = argparse.ArgumentParser(description=description, formatter_class=layout)
    parser.add_argument("--seed", type=int, default=0, help="fixes all that is drawn (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder to write to (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds that only shows that all works")
    return parser


@contextmanager
def screen() -> Iterator[None]:
    """Keep the screen for the example: without Lightning's advice, and figures in one style."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), matplotlib.rc_context(STYLE):
            for advice in ADVICE:
                warnings.filterwarnings("ignore", advice)
            yield
    finally:
        logger.setLevel(level)


def peak_memory() -> float:
    """Return the most memory that this process has held so far, in MiB: Python, torch, data and all.

    It is ``ru_maxrss`` of ``getrusage``; nan on Windows, which does not keep it.
    """
    if resource is None:
        return float("nan")
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def logged(folder: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return what a ``CSVLogger`` wrote into ``folder``: by name, the steps and the values there."""
    curves: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    curves[name][0].append(int(row["step"]))
                    curves[name][1].append(float(value))
    return dict(curves)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content``, paths as text."""
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], files: Sequence[Path] = ()) -> None:
    """Print a table, whose first column is text and whose others are numbers, and what was written."""
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column is columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for file in files:
        console.print(f"wrote {file}", highlight=False, soft_wrap=True)
