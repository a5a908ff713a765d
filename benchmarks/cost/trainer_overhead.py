"""What does a BilevelModule in a Trainer cost over the same loop written by hand?

Reverse mode through T inner steps, three ways with the same arithmetic: a loop of plain PyTorch; that loop in the
`training_step` of a plain LightningModule, so that Lightning's own cost is told apart; and a `BilevelModule` with
`ReverseUnroll`. On MAML with sinusoids (vectorized over 25 tasks, T = 5), on example weights of a perceptron (T = 20)
and of a convolutional net (T = 5). That all take the same outer steps is checked first.

An outer step is everything from one batch to the next: the loader, the gradient, Adam, and what the Trainer does. CPU
seconds of one thread; the contenders take turns, and the least of all their steps counts. What has been measured for
other problems before is kept.

    python benchmarks/cost/trainer_overhead.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.data import DataLoader

from lightning_bilevel import Episode, ReverseUnroll

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.fits import Stopwatch, fit
from support.measure import turns
from support.problems import NETS, RATE, Weighted, episodes, module, sinusoids
from support.results import keep, plot

import report

NAME = "trainer_overhead"
CONTENDERS = {"by hand": report.GREY, "in a LightningModule": "#B0B0B0", "BilevelModule": report.BLUE}
PROBLEMS = ("small", "medium", "CNN")
TASKS, WARM_UP = 25, 2


def maml_by_hand(problem: Any, tasks: Sequence[Episode]) -> Tensor:
    """Return the outer loss with its graph in the net's parameters."""
    x, y, x_query, y_query = (
        torch.stack(column)
        for column in zip(*((*task.inner[0], *task.outer) for task in tasks), strict=True)
    )  # fmt: skip
    loss = vmap(lambda theta, x, y: F.mse_loss(functional_call(problem.net, theta, (x,)), y))
    theta = {name: value.expand(len(tasks), *value.shape) for name, value in problem.net.named_parameters()}
    for _ in range(problem.inner_steps):
        theta = descended(loss(theta, x, y).sum(), theta)
    return loss(theta, x_query, y_query).mean()


def weighted_by_hand(problem: Any, episode: Episode) -> Tensor:
    """Return the outer loss with its graph in the weights."""
    net, (x, y, index), (x_outer, y_outer) = problem.net, episode.inner[0], episode.outer
    theta = {name: value.detach().requires_grad_() for name, value in net.named_parameters()}
    for _ in range(problem.inner_steps):
        losses = F.cross_entropy(functional_call(net, theta, (x,)), y, reduction="none")
        theta = descended((problem.logits[index].sigmoid() * losses).mean(), theta)
    return F.cross_entropy(functional_call(net, theta, (x_outer,)), y_outer)


def descended(loss: Tensor, theta: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
    return {name: value - RATE * grad for (name, value), grad in zip(theta.items(), grads, strict=True)}


class Problem(NamedTuple):
    """One of the three problems.

    Attributes:
        text: what it is.
        make: builds the module.
        batch: what the loader yields.
        by_hand: (module, batch) to the outer loss with its graph.
        outer: the parameters that the outer optimizer has.
    """

    text: str
    make: Callable[[], Any]
    batch: Any
    by_hand: Callable[[Any, Any], Tensor]
    outer: Callable[[Any], list[nn.Parameter]]


def problems() -> dict[str, Problem]:
    def weighted(net: str, steps: int, text: str) -> Problem:
        make: Callable[[], Weighted] = lambda: module(NETS[net], steps)  # noqa: E731
        return Problem(text, make, episodes(NETS[net], 1)[0], weighted_by_hand, lambda m: [m.logits])

    return {
        "small": Problem(
            "MAML, 25 sinusoids, MLP 1-40-40-1, T = 5",
            lambda: sinusoids(TASKS)[0],
            sinusoids(TASKS)[1],
            maml_by_hand,
            lambda m: [*m.net.parameters()],
        ),
        "medium": weighted("MLP", 20, "example weights, MLP 784-256-10, batch 100, T = 20"),
        "CNN": weighted("CNN", 5, "example weights, 4 blocks of 32 channels on 28×28, batch 25, T = 5"),
    }


class ByHand(pl.LightningModule):
    """The loop by hand as a user of Lightning alone would write it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.inside, self.problem = problem.make(), problem

    def training_step(self, batch: Any) -> Tensor:
        loss = self.problem.by_hand(self.inside, batch)
        self.log("outer_loss", loss, prog_bar=True, batch_size=1)
        return loss

    def backward(self, loss: Tensor) -> None:
        loss.backward(inputs=self.problem.outer(self.inside))

    def configure_optimizers(self) -> Any:
        return self.inside.configure_optimizers()


def fitted(fit_module: pl.LightningModule, loader: DataLoader, callbacks: list[pl.Callback]) -> list[float]:
    stopwatch = Stopwatch()
    with report.screen():
        fit(fit_module, loader, *callbacks, stopwatch, max_epochs=1)
    return stopwatch.starts


def looped(inside: Any, problem: Problem, loader: DataLoader) -> list[float]:
    optimizer, outer, starts = inside.configure_optimizers(), problem.outer(inside), []
    for batch in loader:
        starts.append(time.process_time())
        optimizer.zero_grad()
        problem.by_hand(inside, batch).backward(inputs=outer)
        optimizer.step()
    return starts


def turn(name: str, problem: Problem, steps: int) -> tuple[float, list[Tensor]]:
    """Return the seconds of the fastest step of one run, and the outer parameters after it."""
    loader: DataLoader = DataLoader([problem.batch] * (steps + WARM_UP), batch_size=None)
    if name == "by hand":
        inside = problem.make()
        starts = looped(inside, problem, loader)
    elif name == "BilevelModule":
        inside = problem.make()
        starts = fitted(inside, loader, [ReverseUnroll()])
    else:
        outside = ByHand(problem)
        inside, starts = outside.inside, fitted(outside, loader, [])
    seconds = (after - before for before, after in zip(starts[WARM_UP:-1], starts[WARM_UP + 1 :], strict=True))
    return min(seconds), problem.outer(inside)


def check(problem: Problem) -> None:
    """Raise unless all take the same outer steps."""
    first, *others = (turn(name, problem, 3)[1] for name in CONTENDERS)
    for found in others:
        for a, b in zip(first, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def draw(results: dict[str, dict[str, Any]]) -> None:
    with plot(NAME, 1, len(results), size=(3.4 * len(results), 2.6), squeeze=False) as (_, panels):
        for axes, (name, found) in zip(panels[0], results.items(), strict=True):
            seconds = found["cpu seconds"]
            bars = axes.barh(list(seconds), [1000 * value for value in seconds.values()], color=CONTENDERS.values())
            axes.bar_label(
                bars, [f"{1000 * v:.3g}  ×{v / seconds['by hand']:.2f}" for v in seconds.values()], padding=3
            )
            axes.set(title=name, xlabel="CPU milliseconds per outer step", xlim=(0, 1650 * max(seconds.values())))
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", left=False, labelleft=axes is panels[0][0])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (%(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="outer steps in a turn (%(default)s)")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    args = script.begin(parser, argv)
    results: dict[str, dict[str, Any]] = {}
    chosen = {name: problem for name, problem in problems().items() if name in args.problems}
    for name, problem in chosen.items():
        check(problem)
        steps = args.steps * (5 if name == "small" else 1)
        contenders = {each: lambda e=each, p=problem, s=steps: turn(e, p, s)[0] for each in CONTENDERS}
        *_, best = islice(turns(contenders), args.rounds)
        found = {
            "text": problem.text,
            "cpu seconds": best,
            "over by hand": best["BilevelModule"] / best["by hand"],
            "over a LightningModule": best["BilevelModule"] / best["in a LightningModule"],
        }
        for contender, seconds in best.items():
            print(f"{name:8s} {contender:22s} {1000 * seconds:8.2f} ms  {seconds / best['by hand']:.3f}", flush=True)
        results = keep(NAME, {"rounds": args.rounds, "steps": args.steps}, found, name, order=PROBLEMS)
    draw(results)
    return results


if __name__ == "__main__":
    main()
