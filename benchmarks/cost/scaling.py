"""What do more processes gain under `ddp_directions`, and does a cost model foresee it?

A perceptron 784-256-10 on random data, one weight per example outside (N = 5000), T inner steps, `ForwardGradient(b)`,
one thread per process, in a real Trainer. One process with several b and T gives the three constants of

    seconds = T (alpha ceil(b_r / c) + beta b_r) + gamma,    b_r = ceil(b / R),

where c is the chunk (here all of b_r: one chunk); two processes, which the fit has not seen, are compared with what it
says. Bytes are counted at `torch.distributed`. The same model then speaks of 64 and 1024 processes; that is a
prediction, and is marked as one.

    python benchmarks/cost/scaling.py
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader

from lightning_bilevel import FirstOrder, ForwardGradient

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.fits import fit
from support.problems import episodes, module, perceptron_net
from support.results import plot, save

NET = perceptron_net(784, 256, 10, examples=256)._replace(
    make=lambda: nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
)
EXAMPLES = 5000
DIRECTIONS, STEPS = (2, 4, 8, 16), (10, 20, 40)
WARM_UP = 2


class Clock(pl.Callback):
    """Times training batches, and counts the bytes that this process gives to collectives."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.bytes = 0
        for name in ("all_reduce", "all_gather", "broadcast"):
            setattr(distributed, name, self._counted(getattr(distributed, name), name == "all_gather"))

    def _counted(self, collective: Any, gathers: bool) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = args[1] if gathers else args[0]
            self.bytes += tensor.numel() * tensor.element_size()
            return collective(*args, **kwargs)

        return counted

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self._before, self._bytes = time.perf_counter(), self.bytes

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._before)
        self.per_step = self.bytes - self._bytes


def measure(processes: int, cases: Sequence[tuple[int, int]], repeats: int) -> list[dict[str, Any]]:
    """Time fits, in this process and those that Lightning starts: a row for each (b, T); b = 0 is a plain inner run."""
    torch.set_num_threads(1)
    rows = []
    for b, inner_steps in cases:
        data: DataLoader = DataLoader(episodes(NET, 1, EXAMPLES) * (repeats + WARM_UP), batch_size=None)
        clock = Clock()
        strategy = "ddp_directions" if processes > 1 else "auto"
        callbacks = [ForwardGradient(b) if b else FirstOrder(), clock]
        fit(module(NET, inner_steps, EXAMPLES), data, *callbacks, max_epochs=1, strategy=strategy, devices=processes)
        # DDP's own all-reduce of the N gradients is in C++, and is added.
        own = 4 * EXAMPLES if processes > 1 else 0
        seconds = min(clock.seconds[WARM_UP:])
        rows.append({"b": b, "T": inner_steps, "seconds": seconds, "bytes": clock.per_step + own})
    return rows


def launched(processes: int, cases: Sequence[tuple[int, int]], repeats: int) -> list[dict[str, Any]]:
    """Run :func:`measure` in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        arguments = json.dumps({"processes": processes, "cases": cases, "repeats": repeats})
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        subprocess.run([sys.executable, __file__, "--worker", arguments, str(path)], env=environment, check=True)
        rows: list[dict[str, Any]] = json.loads(path.read_text())
        return rows


def fitted(rows: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """Return alpha, beta and gamma by least squares on relative errors."""
    seconds = np.array([row["seconds"] for row in rows])
    features = np.array([[row["T"], row["T"] * row["b"], 1.0] for row in rows])
    alpha, beta, gamma = np.linalg.lstsq(features / seconds[:, None], np.ones(len(rows)), rcond=None)[0]
    return float(alpha), float(beta), float(gamma)


def foreseen(constants: tuple[float, float, float], b: int, inner_steps: int, processes: int) -> float:
    """Return the model's seconds per outer step."""
    alpha, beta, gamma = constants
    return inner_steps * (alpha + beta * math.ceil(b / processes)) + gamma


def draw(rows: list[dict[str, Any]], constants: tuple[float, float, float]) -> None:
    with plot("scaling", 1, 2, size=(9.6, 3.9)) as (_, (left, right)):
        for processes, color in ((1, "#767676"), (2, "#0072B2")):
            chosen = [row for row in rows if row["R"] == processes and row["T"] == 20 and row["b"]]
            b = [row["b"] for row in chosen]
            label = f"{processes} process{'es' * (processes > 1)}"
            left.plot(b, [row["seconds"] for row in chosen], "o", color=color, label=label)
            left.plot(b, [foreseen(constants, each, 20, processes) for each in b], color=color, lw=1.5)
        left.set(xlabel="directions b", ylabel="seconds per outer step, T = 20", xticks=b)
        left.set_title("Measured (dots), model (lines)")
        left.legend()
        ranks = 2 ** np.arange(11)
        for b, color in ((16, "#56B4E9"), (64, "#0072B2"), (1024, "#D55E00")):
            alone = foreseen(constants, b, 20, 1)
            gain = [alone / foreseen(constants, b, 20, int(processes)) for processes in ranks]
            right.plot(ranks, gain, color=color, label=f"b = {b}")
        right.plot(ranks, ranks, color="#B0B0B0", lw=1, ls="--", label="ideal")
        right.set_xscale("log", base=2)
        right.set_yscale("log", base=2)
        right.set(xlabel="processes R", ylabel="times faster than one process")
        right.set_title("What the model says of many processes (not measured)")
        right.legend()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--repeats", type=int, default=6)
    args = script.begin(parser, argv)
    cases = [(0, 20), *((b, 20) for b in DIRECTIONS), *((8, inner_steps) for inner_steps in STEPS if inner_steps != 20)]
    rows = []
    for processes in (1, 2):
        rows += [{"R": processes, **row} for row in launched(processes, cases[processes - 1 :], args.repeats)]
    alone = [row for row in rows if row["R"] == 1 and row["b"]]
    constants = fitted(alone)
    plain = rows[0]["seconds"] / rows[0]["T"]
    for row in rows:
        if row["b"]:
            row["model"] = foreseen(constants, row["b"], row["T"], row["R"])
            print("R = {R}  b = {b:2d}  T = {T:2d}  {seconds:.3f} s  model {model:.3f} s  {bytes} bytes".format(**row))
    predictions = []
    for b in (64, 1024):
        for processes in (1, 2, 8, 64, 1024):
            gain = foreseen(constants, b, 20, 1) / foreseen(constants, b, 20, processes)
            predictions.append({"b": b, "R": processes, "times faster": gain, "efficiency": gain / processes})
    results = {
        "rows": rows,
        "constants": {"alpha": constants[0], "beta": constants[1], "gamma": constants[2], "plain step": plain},
        "predictions": predictions,
    }
    chunk, direction = constants[0] / plain, constants[1] / plain
    print(f"In plain inner steps, per inner step: a chunk costs {chunk:.2f}, a direction {direction:.2f}")
    save("scaling", vars(args), results)
    draw(rows, constants)
    return results


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if len(sys.argv) == 4 and sys.argv[1] == "--worker":
        measured = measure(**json.loads(sys.argv[2]))
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            Path(sys.argv[3]).write_text(json.dumps(measured))
    else:
        main()
