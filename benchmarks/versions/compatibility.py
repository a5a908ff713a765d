"""Which versions of Python, torch and Lightning does this library run with?

Run it with the interpreter of an environment: it holds every hypergradient strategy to `check_strategy`, that is to
exactness on problems with known hypergradients, fits by a Trainer, an exact resume and more, and fits one module by the
Trainer of `lightning.pytorch` as well where that is installed. The row of these versions is kept beside the others.

    python -m venv env && env/bin/pip install "torch==2.4.*" "pytorch-lightning==2.4.*" "lightning==2.4.*" .
    env/bin/python benchmarks/versions/compatibility.py
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_bilevel import BOME
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.table import one_of_each
from lightning_bilevel.testing import check_strategy
from lightning_bilevel.testing.check import PROPERTIES

RESULT = Path(__file__).parents[1] / "results" / "compatibility.json"
OWN_RUN = ("SOBA", "BOME", "MEHA")
"""Strategies whose inner run is not that of the problem: `check_strategy` says to leave out that property."""
FIT = """
import lightning.pytorch as pl, torch
from lightning_bilevel import EpisodeLoader, ReverseUnroll
from lightning_bilevel.testing import Ridge

module = Ridge()
episode = module.episode()
silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = pl.Trainer(max_steps=2, accelerator="cpu", callbacks=[ReverseUnroll()], **silent)
trainer.fit(module, torch.utils.data.DataLoader([episode], batch_size=None))
assert trainer.global_step > 0 and trainer.callback_metrics["outer_loss"].isfinite()
"""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Check, write the row, return it."""
    del argv  # what is asked is a matter of the interpreter
    torch.set_num_threads(1)
    said = {named(strategy): checked(strategy) for strategy in strategies()}
    row = {
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
        "pytorch-lightning": version("pytorch-lightning"),
        "lightning": with_lightning(),
        "strategies": said,
    }
    rows = json.loads(RESULT.read_text())["results"] if RESULT.is_file() else []
    key = ("python", "torch", "pytorch-lightning")
    rows = [each for each in rows if any(each[name] != row[name] for name in key)]
    rows = sorted([*rows, row], key=lambda each: [numbers(each[name]) for name in key])
    RESULT.write_text(json.dumps({"settings": {"properties": list(PROPERTIES)}, "results": rows}, indent=1) + "\n")
    print(json.dumps(row, indent=1))
    return row


def strategies() -> list[HypergradientStrategy]:
    """Return every strategy; with a smaller η, no mask of dropout reaches BOME's estimate, which is checked, too."""
    return [BOME(eta=5.0) if isinstance(each, BOME) else each for each in one_of_each()]


def named(strategy: HypergradientStrategy) -> str:
    """Return its class, and the engine of a forward gradient, which has two."""
    return f"{type(strategy).__name__} {getattr(strategy, 'mode', '')}".strip()


def checked(strategy: HypergradientStrategy) -> str:
    """Return ``"ok"``, or what failed."""
    left_out = {"takes_the_inner_run"} if type(strategy).__name__ in OWN_RUN else set()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_strategy(strategy, properties=[name for name in PROPERTIES if name not in left_out])
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "ok"


def with_lightning() -> str | None:
    """Return the version of ``lightning`` whose Trainer fits, in a process of its own, or what it says; else None."""
    try:
        found = version("lightning")
    except PackageNotFoundError:
        return None
    command = [sys.executable, "-W", "ignore", "-c", FIT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return found if done.returncode == 0 else f"{found}: {done.stderr.splitlines()[-1]}"


def numbers(text: str) -> list[int]:
    """Return the parts of a version to sort by."""
    return [int(part) for part in text.split(".") if part.isdigit()]


if __name__ == "__main__":
    main()
