"""One outer step, as it is, with ``compile=True``, and in JAX: MAML, data cleaning, forward and implicit gradients.

Ours is a training step of a Trainer with all that Lightning does for it; JAX's is one jitted function with the outer
optimizer inside (optax), its state made beforehand, of several programs the fastest. That all compute the same
hypergradient is checked first: who does not is listed with the difference, and is not timed. What a step of the Trainer
takes that computes nothing, logs nothing and has the same optimizer, is measured beside, and one that calls
``self.log`` as many times as there are numbers that ours logs.

Time: CPU seconds of the process, one thread; the contenders take turns and the least of all their steps counts. What
compiling takes is listed beside: seconds by the clock until the first estimate is there, C++ compiler and all, which is
to be found out with an empty cache (``TORCHINDUCTOR_CACHE_DIR``) on a machine that does nothing else.

    pip install jax optax
    python benchmarks/peers/against_jax.py [--cases sinusoids images cleaning100 cleaning1000 forward100 implicit]
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from data_cleaning_speed import CASES as CLEANING
from data_cleaning_speed import Cleaning
from torch.utils.data import DataLoader

from lightning_bilevel import (
    ForwardGradient,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    hypergradient,
    tree,
)
from lightning_bilevel.linear_solvers import Neumann
from lightning_bilevel.randomness import Key

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.few_shot_problems import images, sinusoids
from support.fits import Stopwatch, fit
from support.in_jax import Step, back, cleaning_step, image_loss, implicit_step, meta_step, of, sinusoid_loss
from support.measure import cpu_seconds, turns
from support.penalties import LR, TERMS, penalties
from support.results import keep

import report

NAME = "against_jax"
ROUNDING = 1e-3
DIRECTIONS = 16


@dataclass
class Case:
    """A problem.

    Attributes:
        make: returns the module and a batch.
        strategy: ours.
        in_jax: programs, by name, for a module, its batch and directions.
        steps: ours, in a turn.
    """

    make: Callable[[], tuple[Any, Any]]
    in_jax: Callable[[Any, Any, Any], dict[str, Step]]
    strategy: Callable[[], HypergradientStrategy] = ReverseUnroll
    steps: int = 10


def maml(make: Callable[[], Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module, loader = make()
    return module, next(iter(loader))


def maml_in_jax(
    loss: Callable[..., Any], ways: Sequence[str], module: Any, episodes: Any, rows: Any
) -> dict[str, Step]:
    p = {name: of(value) for name, value in module.named_parameters()}
    columns = zip(*((*episode.inner[0], *episode.outer) for episode in episodes), strict=True)
    batch = [of(torch.stack(column)) for column in columns]
    lr = module.hparams.inner_lr
    return {f"tasks {way}": meta_step(loss, p, batch, module.inner_steps, lr, way) for way in ways}


def cleaning(examples: int, steps: int) -> tuple[Any, Any]:
    case = CLEANING["mlp"]._replace(examples=examples, steps=steps)
    return Cleaning(case.task()), case.episode()


def cleaning_in_jax(module: Any, episode: Any, rows: Any) -> dict[str, Step]:
    p = {name: of(value) for name, value in module.named_parameters()}
    data = [of(value) for value in (*episode.inner[0][:2], *episode.outer[:2])]
    task = module.task
    step = cleaning_step(p, data, module.inner_steps, task.inner_lr, task.decay, None if rows is None else of(rows))
    return {"scan": step}


def implicit_in_jax(module: Any, episode: Any, rows: Any) -> dict[str, Step]:
    p = {name: of(value) for name, value in module.named_parameters()}
    data = [of(value) for value in (*episode.inner[0], *episode.outer)]
    return {"products": implicit_step(p, data, LR, TERMS)}


CASES = {
    "sinusoids": Case(partial(maml, sinusoids), partial(maml_in_jax, sinusoid_loss, ["vmap"]), steps=100),
    "images": Case(partial(maml, images), partial(maml_in_jax, image_loss, ["vmap", "written out"])),
    "cleaning100": Case(partial(cleaning, 100, 20), cleaning_in_jax, steps=20),
    "cleaning1000": Case(partial(cleaning, 1000, 20), cleaning_in_jax, steps=4),
    "forward100": Case(partial(cleaning, 100, 100), cleaning_in_jax, lambda: ForwardGradient(DIRECTIONS), steps=2),
    "implicit": Case(penalties, implicit_in_jax, lambda: ImplicitGradient(Neumann(TERMS, step_size=LR)), steps=300),
}


class Ours:
    """A training step of this library.

    Args:
        case: the problem.
        compiles: whether inner steps are compiled.
    """

    def __init__(self, case: Case, compiles: bool) -> None:
        self.case, self.compiles = case, compiles

    def begin(self) -> None:
        """Take the first estimate."""
        module, batch = self.case.make()
        module.compiles_steps = self.compiles
        hypergradient(module, self.case.strategy(), batch)

    def first(self, rows: Any) -> dict[str, torch.Tensor]:
        """Return the hypergradient, along the directions that JAX's program has."""
        module, batch = self.case.make()
        module.compiles_steps = self.compiles
        strategy = ReverseUnroll() if rows is not None else self.case.strategy()
        found = hypergradient(module, strategy, batch).grads
        return found if rows is None else projected(found, rows)

    def seconds(self) -> float:
        """Return the least CPU seconds of a training step."""
        module, batch = self.case.make()
        module.compiles_steps = self.compiles
        return least_step(module, batch, self.case.steps, self.case.strategy())


class Alone(pl.LightningModule):
    """A module that computes nothing: what a step of the Trainer takes without this library.

    Args:
        trained: parameters like these are stepped on, by fused Adam.
        logged: numbers that each step logs.
    """

    def __init__(self, trained: Sequence[torch.Tensor], logged: int) -> None:
        super().__init__()
        self.trained = torch.nn.ParameterList([torch.nn.Parameter(value.detach().clone()) for value in trained])
        self.logged = logged

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        """Return a loss whose gradients are zeros."""
        loss = torch.stack([(parameter * 0).sum() for parameter in self.trained]).sum()
        for place in range(self.logged):
            self.log(f"number {place}", loss.detach(), prog_bar=place == 0, batch_size=1)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the outer optimizer of the problems."""
        return torch.optim.Adam(self.parameters(), fused=True)


def alone(case: Case, steps: int = 200) -> tuple[float, float]:
    """Return the least CPU seconds of a step that does nothing, and of one that logs as many numbers as ours."""
    module, batch = case.make()
    result = hypergradient(module, case.strategy(), batch)
    trained = [module.get_parameter(name) for name in result.grads]
    logged = len({*result.metrics, "outer_loss", "hypergradient_norm"})
    nothing, logging = (least_step(Alone(trained, count), batch, steps) for count in (0, logged))
    return nothing, logging


def least_step(module: pl.LightningModule, batch: Any, steps: int, *callbacks: pl.Callback) -> float:
    """Return the least CPU seconds of a training step on a batch, after two that look at the module and compile."""
    stopwatch, data = Stopwatch(), DataLoader([batch] * (steps + 2), batch_size=None)
    with report.screen():
        fit(module, data, *callbacks, stopwatch, max_steps=steps + 2)
    return min(stopwatch.seconds[2:])


class InJax:
    """A step of one of JAX's programs."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def begin(self) -> None:
        """Compile."""
        self.step()

    def first(self, rows: Any) -> dict[str, torch.Tensor]:
        """Return the estimate."""
        return back(self.step())

    def seconds(self) -> float:
        """Return the least CPU seconds of some steps."""
        return min(cpu_seconds(self.step) for _ in range(5))


def projected(grads: dict[str, torch.Tensor], rows: Any) -> dict[str, torch.Tensor]:
    v = {"example_logits": rows}
    return tree.combine(tree.rows_dot(v, grads) / len(rows), v)


def measure(case: Case, rounds: int) -> Iterator[list[dict[str, Any]]]:
    """Yield a row for each contender after each round of turns."""
    module, batch = case.make()
    forward = isinstance(case.strategy(), ForwardGradient)
    rows = None
    if forward:
        generator = Key((0,)).generator(0)
        rows = torch.randn(DIRECTIONS, module.example_logits.numel(), generator=generator)
    contenders: dict[str, Any] = {
        "lightning_bilevel": Ours(case, False),
        "lightning_bilevel, compiled": Ours(case, True),
    }
    contenders |= {f"JAX, {name}": InJax(step) for name, step in case.in_jax(module, batch, rows).items()}
    found: list[dict[str, Any]] = []
    reference = contenders["lightning_bilevel"].first(rows)
    for name, contender in contenders.items():
        began = time.perf_counter()
        contender.begin()
        took = time.perf_counter() - began
        grads: dict[str, torch.Tensor] = contender.first(rows)
        difference = float(tree.norm(tree.sub(grads, reference)) / tree.norm(reference))
        found.append({"contender": name, "difference": difference, "first": took, "same": difference <= ROUNDING})
        print(found[-1], flush=True)
    running = [row for row in found if row["same"]]
    for best in islice(turns({row["contender"]: contenders[row["contender"]].seconds for row in running}), rounds):
        for row in running:
            row["cpu seconds"] = best[row["contender"]]
        yield found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="the other cases are kept")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (%(default)s)")
    args = script.begin(parser, argv)
    results: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in args.cases:
            idle, logging = alone(CASES[name])
            print(name, f"Lightning alone: {idle}, with self.log: {logging}", flush=True)
            for turn, rows in enumerate(measure(CASES[name], args.rounds), start=1):
                found = {"rounds": turn, "Lightning alone": idle, "with self.log": logging, "rows": rows}
                results = keep(NAME, {"directions": DIRECTIONS}, found, name, order=CASES)
            for row in rows:
                print(name, " ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    return results


if __name__ == "__main__":
    main()
