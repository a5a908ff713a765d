"""Where and how benchmarks keep their results: one JSON and one plot per question."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"
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


def plot_path(name: str) -> Path:
    """Return where the plot of a benchmark goes."""
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{name}.png"


def environment() -> dict[str, Any]:
    """Describe the machine, the versions and the commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in PACKAGES},
    }
