"""Where and how benchmarks keep their results: one JSON and one plot per question."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

import report

RESULTS = Path(__file__).parents[1] / "results"
IMAGES = Path(__file__).parents[2] / "docs" / "images"
ORANGE, SKY, PURPLE = "#E69F00", "#56B4E9", "#CC79A7"  # the colours of Okabe and Ito that `report` does not have
PACKAGES = ("torch", "pytorch-lightning", "numpy")


def save(name: str, settings: dict[str, Any], results: Any) -> Path:
    """Write ``results/NAME.json``: settings, results, and the machine, versions and commit they come from."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {"settings": settings, "results": results, "environment": environment()}
    path.write_text(json.dumps(record, indent=1, default=float) + "\n")
    print(f"Wrote {path}")
    return path


def earlier(name: str) -> Any:
    """Return the results in ``results/NAME.json``, so that a run of one part can keep the others; empty at first."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["results"] if path.is_file() else {}


def keep(name: str, settings: dict[str, Any], found: Any, *part: str, order: Iterable[str] = ()) -> dict[str, Any]:
    """Put what was found of one part into ``results/NAME.json``, beside the others; return all.

    Args:
        name: of the file, which is read only now: another part may have been measured meanwhile.
        settings: what holds for all.
        found: what comes in the place of what was found before.
        *part: the keys that lead there.
        order: of the first of these keys in the file, if not as they came.
    """
    results = place = earlier(name)
    for key in part[:-1]:
        place = place.setdefault(key, {})
    place[part[-1]] = found
    results = {key: results[key] for key in order or results if key in results}
    save(name, settings, results)
    return results


def plot_path(name: str) -> Path:
    """Return where the plot of a benchmark goes."""
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{name}.png"


@contextmanager
def plot(
    name: str, rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """Yield a figure and its panels, in the style of the examples; write ``results/NAME.png`` at the end.

    Args:
        name: of the plot.
        rows: of panels.
        columns: of panels.
        size: in inches.
        **options: of ``Figure.subplots``.
    """
    with matplotlib.rc_context(report.STYLE):
        figure = Figure(figsize=size)
        yield figure, figure.subplots(rows, columns, **options)
        figure.savefig(plot_path(name))


def to_docs(name: str, to: str | None = None) -> None:
    """Copy a plot to the pictures of the documentation, under another name if there is one."""
    shutil.copy(plot_path(name), IMAGES / f"{to or name}.png")


def commit(checkout: Path | None = None) -> str:
    """Return the commit of a checkout, by default that around the working directory."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return (
        subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    )


def environment() -> dict[str, Any]:
    """Describe the machine, the versions and the commit."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in PACKAGES},
    }
