"""One hypergradient of data cleaning: this library beside higher, TorchOpt, BOAT, Betty and loops written by hand.

The inner problem learns a net 784-256-10 (or a convolutional one) on N examples, all of them in each of T steps; the
outer parameters are N example weights. Contenders of one method get the same start, data, T, optimizer and solver
settings. That they compute the same hypergradient is checked first: one that does not, or does not run, is listed with
the difference or the message, and is not timed.

Time: CPU seconds of the process, one thread; the contenders take turns and the least of all their estimates counts.
Ours is a training step of a Trainer with all that Lightning does for it. Memory: the most that tensors hold at once in
one estimate. Betty and BOAT are left out where they are not installed (docs/peers.md says how).

    python benchmarks/data_cleaning_speed.py [--cases mlp implicit long adam cnn]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
import torchopt
from _cleaning_programs import (
    TERMS,
    Batch,
    Case,
    Estimate,
    by_hand,
    conjugate_gradient,
    implicit_by_hand,
    inner_loss,
    neumann,
    outer_loss,
    with_betty,
    with_boat,
    with_higher,
    with_torchopt,
    with_torchopt_implicit,
)
from _results import RESULTS, plot_path, save
from _tensor_memory import tensor_peak
from maml_speed import Stopwatch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bilevel import (
    SGD,
    Adam,
    BilevelModule,
    Episode,
    ForwardGradient,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    hypergradient,
)
from lightning_bilevel.linear_solvers import ConjugateGradient, Identity, Neumann

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import report  # noqa: E402
from few_shot.nets import cnn  # noqa: E402

ROUNDING, DIFFERENCES = 1e-3, 2e-2
"""Relative differences that count as the same: of float32, and of a derivative by finite differences."""


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10))


CASES = {
    "mlp": Case(mlp, (784,), 1000, lr=0.1),
    "implicit": Case(mlp, (784,), 1000, lr=0.1),
    "long": Case(mlp, (784,), 1000, lr=0.1, steps=100),
    "adam": Case(mlp, (784,), 1000, lr=1e-3, adam=True),
    "cnn": Case(partial(cnn, 10, channels=32), (1, 28, 28), 200, lr=0.1),
}


class Cleaning(BilevelModule):
    def __init__(self, case: Case) -> None:
        super().__init__(case.steps, "reset")
        self.net, self.example_logits = case.start()
        self.case = case

    def inner_parameters(self) -> nn.Module:
        return self.net

    def inner_loss(self, batch: Batch) -> Tensor:
        return inner_loss(self.net, list(self.net.parameters()), self.example_logits, batch)

    def outer_loss(self, batch: Batch) -> Tensor:
        return outer_loss(self.net, batch)

    def configure_inner_optimizer(self) -> SGD | Adam:
        return Adam(lr=self.case.lr) if self.case.adam else SGD(lr=self.case.lr)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.example_logits], lr=0.0)  # all steps of a run compute the same


def ours(strategy: HypergradientStrategy) -> Callable[[Case], Estimate]:
    def make(case: Case) -> Estimate:
        module, episode = Cleaning(case), Episode([case.batch(0)], case.batch(1))
        return lambda: hypergradient(module, strategy, episode).grads["example_logits"]

    return make


def time_ours(strategy: HypergradientStrategy, case: Case, repeats: int) -> float:
    """Return the least seconds of a training step; the first one also checks the module, and is left out."""
    stopwatch = Stopwatch()
    episodes = [Episode([case.batch(0)], case.batch(1))] * (repeats + 1)
    trainer = pl.Trainer(
        max_steps=repeats + 1,
        callbacks=[strategy, stopwatch],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with report.screen():
        trainer.fit(Cleaning(case), DataLoader(episodes, batch_size=None))
    return min(stopwatch.seconds[1:])


@dataclass(frozen=True)
class Contender:
    """A library's way to one method; ``strategy`` where the library is this one."""

    method: str
    library: str
    make: Callable[[Case], Estimate]
    strategy: HypergradientStrategy | None = None
    tolerance: float = ROUNDING


def contenders(case: Case, name: str) -> Iterator[Contender]:
    """Yield the contenders of a case; the first of each method is ours, and the reference of the others."""

    def of_ours(method: str, strategy: HypergradientStrategy) -> Contender:
        return Contender(method, "lightning_bilevel", ours(strategy), strategy)

    betty, boat = find_spec("betty") is not None, find_spec("boat_torch") is not None
    if name == "implicit":
        yield of_ours("Neumann", ImplicitGradient(Neumann(TERMS, step_size=case.lr)))
        yield Contender("Neumann", "by hand", implicit_by_hand(neumann))
        series = torchopt.linear_solve.solve_inv(ns=True, maxiter=TERMS - 1, alpha=case.lr)
        yield Contender("Neumann", "TorchOpt", with_torchopt_implicit(series))
        if boat:
            yield Contender("Neumann", "BOAT", with_boat("NS"))
        if betty:
            yield Contender("Neumann", "Betty", with_betty("neumann"))
        yield of_ours("CG", ImplicitGradient(ConjugateGradient(TERMS, tol=1e-12)))
        yield Contender("CG", "by hand", implicit_by_hand(conjugate_gradient))
        cg = torchopt.linear_solve.solve_cg(maxiter=TERMS, rtol=0.0)
        yield Contender("CG", "TorchOpt", with_torchopt_implicit(cg))
        if boat:
            yield Contender("CG", "BOAT", with_boat("CG"))
        if betty:
            yield Contender("CG", "Betty", with_betty("cg"))
        yield of_ours("identity", ImplicitGradient(Identity()))
        if boat:
            yield Contender("identity", "BOAT", with_boat("FD"), tolerance=DIFFERENCES)
        if betty:
            yield Contender("identity", "Betty", with_betty("darts"), tolerance=DIFFERENCES)
        return
    yield of_ours("reverse", ReverseUnroll())
    yield of_ours("reverse, checkpoints", ReverseUnroll(checkpoint="sqrt"))
    if not case.adam:
        yield Contender("reverse", "by hand", by_hand)
    yield Contender("reverse", "higher", with_higher)
    yield Contender("reverse", "TorchOpt", with_torchopt)
    if boat:
        yield Contender("reverse", "BOAT", with_boat("RAD"))
    if betty and name == "mlp":
        yield Contender("reverse", "Betty", with_betty("darts", unrolled=True))
    if name in ("mlp", "long"):
        yield of_ours("forward gradient, 1", ForwardGradient(1))
    if name == "mlp":
        yield of_ours("forward gradient, 4", ForwardGradient(4))


def time_peer(make: Callable[[Case], Estimate], case: Case, repeats: int) -> float:
    estimate, seconds = make(case), []
    for _ in range(repeats + 1):
        began = time.process_time()
        estimate()
        seconds.append(time.process_time() - began)
    return min(seconds[1:])


def compare(all_of_them: Sequence[Contender], case: Case) -> list[dict[str, Any]]:
    """Return a row for each contender: its memory and its relative difference from ours, or why there is none."""
    references: dict[str, Tensor] = {}
    rows = []
    for contender in all_of_them:
        row: dict[str, Any] = {"method": contender.method, "library": contender.library}
        try:
            grad, mib = tensor_peak(contender.make(case))
        except Exception as error:
            row["fails"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            reference = references.setdefault(contender.method, grad)
            if contender.method == "reverse, checkpoints":
                reference = references["reverse"]
            row["difference"] = float((grad - reference).norm() / reference.norm())
            row["same"] = row["difference"] <= contender.tolerance
            row["MiB"] = mib
        print(row, flush=True)
        rows.append(row)
    return rows


def measure(name: str, rounds: int, repeats: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a case after each round of turns: a run that is cut off keeps what it has."""
    case = CASES[name]
    all_of_them = list(contenders(case, name))
    rows = compare(all_of_them, case)
    running = [pair for pair in zip(all_of_them, rows, strict=True) if pair[1].get("same")]
    for _ in range(rounds):
        for contender, row in running:
            gc.collect()  # or one contender pays for what another has left behind
            if contender.strategy is not None:
                seconds = time_ours(contender.strategy, case, repeats)
            else:
                seconds = time_peer(contender.make, case, repeats)
            row["cpu seconds"] = min(seconds, row.get("cpu seconds", seconds))
        running.append(running.pop(0))  # whoever comes first finds the caches as nobody else does
        yield rows


def of_the_best_other(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, by method, our time and memory over the least of the other libraries' and of the loop by hand."""
    measured = [row for row in rows if "cpu seconds" in row]
    found = {}
    for row in measured:
        others = [r for r in measured if r["library"] != row["library"] and r["method"] == row["method"].split(",")[0]]
        if row["library"] == "lightning_bilevel" and others:
            keys = ("cpu seconds", "MiB")
            found[row["method"]] = {key: row[key] / min(other[key] for other in others) for key in keys}
    return found


def peers() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, package in {
        "higher": "higher",
        "TorchOpt": "torchopt",
        "BOAT": "boat-torch",
        "Betty": "betty-ml",
    }.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = None
    return found


def draw(rows: Sequence[dict[str, Any]]) -> None:
    """Draw the reverse mode of the net 784-256-10: time, and memory."""
    shown = [row for row in rows if row["method"].startswith("reverse") and "cpu seconds" in row]
    shown.sort(key=lambda row: row["library"] != "lightning_bilevel")
    names = [row["library"] + (",\ncheckpoints" if "check" in row["method"] else "") for row in shown][::-1]
    colors = [report.BLUE if name.startswith("lightning") else report.GREY for name in names]
    with plt.rc_context(report.STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9, 2.9), sharey=True)
        for axes, key, title, form in zip(
            panels,
            ("cpu seconds", "MiB"),
            ("CPU seconds of one hypergradient", "Peak memory, MiB"),
            ("%.2f", "%.0f"),
            strict=True,
        ):
            axes.bar_label(axes.barh(names, [row[key] for row in shown][::-1], color=colors), fmt=form, padding=3)
            axes.set(title=title)
            axes.margins(x=0.12)
            axes.grid(axis="y", visible=False)
        figure.savefig(plot_path("data_cleaning_speed"))
        plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="the other cases are kept")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (%(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="estimates in a turn, after one more (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    path = RESULTS / "data_cleaning_speed.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the others' deprecated calls, and that 10 iterations of CG do not converge
        for name in args.cases:
            for rows in measure(name, args.rounds, args.repeats):
                results[name] = {"rows": rows, "of the best other": of_the_best_other(rows)}
                settings = {"rounds": args.rounds, "repeats": args.repeats, "K": TERMS, "peers": peers()}
                save("data_cleaning_speed", settings, results)
            for row in rows:
                print(" ".join(f"{key}: {value}" for key, value in row.items()))
            print(name, results[name]["of the best other"], flush=True)
    if "mlp" in results:
        draw(results["mlp"]["rows"])
    return results


if __name__ == "__main__":
    main()
