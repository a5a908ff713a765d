"""One hypergradient of data cleaning: this library beside higher, TorchOpt, BOAT, Betty and loops written by hand.

The inner problem learns a net 784-256-10 (or a convolutional one) on N examples, all of them in each of T steps; the
outer parameters are N example weights. Contenders of one method get the same start, data, T, optimizer and solver
settings. That they compute the same hypergradient is checked first: one that does not, or does not run, is listed with
the difference or the message, and is not timed.

Time: CPU seconds of the process, one thread; the contenders take turns and the least of all their estimates counts.
Ours is a training step of a Trainer with all that Lightning does for it. Memory: the most that tensors hold at once in
one estimate. Betty and BOAT are left out where they are not installed (benchmarks/results/peers.md says how).

    python benchmarks/peers/data_cleaning_speed.py [--cases mlp implicit long adam cnn]
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bilevel import (
    SGD,
    Adam,
    BilevelModule,
    Episode,
    ForwardGradient,
    HypergradientStrategy,
    ReverseUnroll,
    hypergradient,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.cleaning import Batch, outer_loss
from support.fits import Stopwatch, fit
from support.measure import cpu_seconds, tensor_peak, turns
from support.peers import PEERS, ROUNDING, SAME, Loop, Solver, Task, versions
from support.results import keep, plot

import report
from few_shot.nets import cnn

NAME = "data_cleaning_speed"
OURS = "lightning_bilevel"
REVERSE, FORWARD = ("reverse", "reverse, checkpoints"), ("forward gradient, 1", "forward gradient, 4")
STRATEGIES: dict[str, Callable[[Task], HypergradientStrategy]] = {
    **SAME,
    "reverse, checkpoints": lambda task: ReverseUnroll(checkpoint="sqrt"),
    "forward gradient, 1": lambda task: ForwardGradient(1),
    "forward gradient, 4": lambda task: ForwardGradient(4),
}
"""Ours, by method."""
TERMS, DECAY = 10, 0.2
"""Terms of the Neumann series and iterations of CG; the L2 penalty that keeps the inner Hessian positive definite."""


class Case(NamedTuple):
    """A problem.

    Attributes:
        net: makes the net.
        shape: of an example.
        examples: N; all of them are in every inner batch.
        lr: the inner learning rate.
        adam: Adam as the inner optimizer, else gradient descent.
        steps: T.
        methods: of ours.
        without: programs of others that do not take part.
    """

    net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    examples: int
    lr: float
    adam: bool = False
    steps: int = 20
    methods: Sequence[str] = REVERSE
    without: Sequence[str] = ("Betty, reverse",)

    def task(self) -> Task:
        torch.manual_seed(0)
        return Task(
            self.net(),
            self.examples,
            self.steps,
            self.lr,
            partial(torch.optim.SGD, lr=1.0),
            self.adam,
            DECAY,
            Solver(TERMS, step_size=self.lr, iterations=TERMS, damping=0.0),
        )

    def episode(self) -> Episode:
        train, test = (self.batch(seed) for seed in (0, 1))
        return Episode([train], test)

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.examples, *self.shape, generator=generator)
        return x, x.flatten(1)[:, :10].argmax(1), torch.arange(self.examples)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10))


CASES = {
    "mlp": Case(mlp, (784,), 1000, lr=0.1, methods=[*REVERSE, *FORWARD], without=()),
    "implicit": Case(mlp, (784,), 1000, lr=0.1, methods=["Neumann", "CG", "identity"]),
    "long": Case(mlp, (784,), 1000, lr=0.1, steps=100, methods=[*REVERSE, FORWARD[0]]),
    "adam": Case(mlp, (784,), 1000, lr=1e-3, adam=True, without=["by hand, reverse", "Betty, reverse"]),
    "cnn": Case(partial(cnn, 10, channels=32), (1, 28, 28), 200, lr=0.1),
}
"""Betty's reverse mode does not run (benchmarks/results/peers.md): one case shows it; Adam by hand is not written."""


class Cleaning(BilevelModule):
    def __init__(self, task: Task) -> None:
        super().__init__(task.inner_steps, "reset")
        self.net, self.example_logits = task.start()
        self.task = task

    def inner_parameters(self) -> nn.Module:
        return self.net

    def inner_loss(self, batch: Batch) -> Tensor:
        return self.task.inner_loss(self.net, self.net.parameters(), self.example_logits, batch)

    def outer_loss(self, batch: Batch) -> Tensor:
        return outer_loss(self.net, batch)

    def configure_inner_optimizer(self) -> SGD | Adam:
        return (Adam if self.task.adam else SGD)(lr=self.task.inner_lr)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.task.outer_optimizer([self.example_logits])


@dataclass(frozen=True)
class Contender:
    """A library's way to one method: a strategy of this one, or what makes the loop of another."""

    method: str
    library: str
    way: HypergradientStrategy | Callable[[Task], Loop]
    tolerance: float = ROUNDING

    def first(self, case: Case) -> tuple[Tensor, float]:
        """Return the hypergradient at the start, and the MiB that it takes."""
        task, episode = case.task(), case.episode()
        if isinstance(self.way, HypergradientStrategy):
            module, strategy = Cleaning(task), self.way
            return tensor_peak(lambda: hypergradient(module, strategy, episode).grads["example_logits"])
        loop = self.way(task)
        return tensor_peak(lambda: loop.hypergradient(episode))

    def seconds(self, case: Case, repeats: int) -> float:
        """Return the least CPU seconds of an outer step."""
        if isinstance(self.way, HypergradientStrategy):
            return time_ours(self.way, case, repeats)
        return time_peer(self.way, case, repeats)


def contenders(case: Case) -> list[Contender]:
    """Return the contenders of a case that are installed; the first of each method is ours, and their reference."""
    task = case.task()
    found = [Contender(method, OURS, STRATEGIES[method](task)) for method in case.methods]
    peers = [peer for peer in PEERS.values() if peer.name not in case.without and peer.installed]
    found += [Contender(p.method, p.library, p.make, p.tolerance) for p in peers if p.method in case.methods]
    return sorted(found, key=lambda contender: case.methods.index(contender.method))


def time_ours(strategy: HypergradientStrategy, case: Case, repeats: int) -> float:
    """Return the least seconds of a training step; the first one also checks the module, and is left out."""
    stopwatch = Stopwatch()
    data: DataLoader = DataLoader([case.episode()] * (repeats + 1), batch_size=None)
    with report.screen():
        fit(Cleaning(case.task()), data, strategy, stopwatch, max_steps=repeats + 1)
    return min(stopwatch.seconds[1:])


def time_peer(make: Callable[[Task], Loop], case: Case, repeats: int) -> float:
    loop, episode = make(case.task()), case.episode()
    return min([cpu_seconds(lambda: loop.step(episode)) for _ in range(repeats + 1)][1:])


def compare(all_of_them: Sequence[Contender], case: Case) -> list[dict[str, Any]]:
    """Return a row for each contender: its memory and its relative difference from ours, or why there is none."""
    references: dict[str, Tensor] = {}
    rows = []
    for contender in all_of_them:
        row: dict[str, Any] = {"method": contender.method, "library": contender.library}
        try:
            grad, mib = contender.first(case)
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
    all_of_them = contenders(case)
    rows = compare(all_of_them, case)
    running = [pair for pair in zip(all_of_them, rows, strict=True) if pair[1].get("same")]
    found = turns({str(place): partial(each.seconds, case, repeats) for place, (each, _) in enumerate(running)})
    for best in islice(found, rounds):
        for (_, row), seconds in zip(running, best.values(), strict=True):
            row["cpu seconds"] = seconds
        yield rows


def of_the_best_other(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, by method, our time and memory over the least of the other libraries' and of the loop by hand."""
    measured = [row for row in rows if "cpu seconds" in row]
    found = {}
    for row in measured:
        others = [r for r in measured if r["library"] != row["library"] and r["method"] == row["method"].split(",")[0]]
        if row["library"] == OURS and others:
            keys = ("cpu seconds", "MiB")
            found[row["method"]] = {key: row[key] / min(other[key] for other in others) for key in keys}
    return found


def draw(rows: Sequence[dict[str, Any]]) -> None:
    """Draw the reverse mode of the net 784-256-10: time, and memory."""
    shown = [row for row in rows if row["method"].startswith("reverse") and "cpu seconds" in row]
    shown.sort(key=lambda row: row["library"] != OURS)
    names = [row["library"] + (",\ncheckpoints" if "check" in row["method"] else "") for row in shown][::-1]
    colors = [report.BLUE if name.startswith("lightning") else report.GREY for name in names]
    with plot(NAME, 1, 2, size=(9, 2.9), sharey=True) as (_, panels):
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


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="the other cases are kept")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (%(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="estimates in a turn, after one more (%(default)s)")
    args = script.begin(parser, argv)
    results: dict[str, Any] = {}
    settings = {"repeats": args.repeats, "K": TERMS, "peers": versions()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the others' deprecated calls, and that 10 iterations of CG do not converge
        for name in args.cases:
            for turn, rows in enumerate(measure(name, args.rounds, args.repeats), start=1):
                found = {"rounds": turn, "rows": rows, "of the best other": of_the_best_other(rows)}
                results = keep(NAME, settings, found, name)
            for row in rows:
                print(" ".join(f"{key}: {value}" for key, value in row.items()))
            print(name, results[name]["of the best other"], flush=True)
    if "mlp" in results:
        draw(results["mlp"]["rows"])
    return results


if __name__ == "__main__":
    main()
