"""What keeps an outer level from overfitting: data cleaning with 1,200 weights and 50 trusted examples, over seeds.

Half of the labels are any other one (the first setting of `cleaning_baselines.py`; start, steps and seeds are its).
A remedy changes one thing about the run with one weight each, or about the one whose weights are a function of loss and
label. Every run is judged by the accuracy of its own net on the trusted examples, which the outer level has seen, and
on test examples; and on these by nets trained anew with the weights it found, without the trusted examples and with
them. `early stopping` learns from half of the trusted examples and takes the weights of the outer step after which the
other half had the least loss; `cross-fitting` is two runs, each of which has one half in the outer loss and the other
one in the inner loss, and the mean of their logits.

    python benchmarks/papers/outer_overfitting.py
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import pytorch_lightning as pl
import torch
from cleaning_baselines import INNER_STEPS, OUTER_STEPS, SETTINGS, STEPS, cleaning_data
from support import fits, script
from support.results import keep
from torch import Tensor
from torch.utils.data import DataLoader

import report
from cleaning import baselines
from cleaning.baselines import Examples, Task
from data_cleaning import WEIGHTS, DataCleaning
from lightning_bilevel import Episode, ReverseUnroll

SETTING = SETTINGS["any 50%, 50"]
PRIOR = 0.1
"""Of the mean square of the logits in the outer loss."""


class Remedy(NamedTuple):
    """What is different from a run without remedies.

    Attributes:
        inside: trusted examples are in the inner loss, too.
        halves: of the trusted examples that the outer level has: all of them (0), one (1), or each in a run (2).
        prior: factor of the mean square of what is learned, in the outer loss.
        horizon: inner steps for each outer one, as a multiple.
        averaged: what is learned is the mean over the second half of the outer steps.
    """

    inside: bool = False
    halves: int = 0
    prior: float = 0.0
    horizon: int = 1
    averaged: bool = False


REMEDIES = {
    "none": Remedy(),
    "trusted examples inside": Remedy(inside=True),
    "early stopping": Remedy(halves=1),
    "cross-fitting": Remedy(inside=True, halves=2),
    "a prior": Remedy(prior=PRIOR),
    "a horizon three times as long": Remedy(horizon=3),
    "the mean over outer steps": Remedy(averaged=True),
    "trusted inside, and the mean": Remedy(inside=True, averaged=True),
}


class Watch(pl.Callback):
    """Keeps what is learned after each outer step, and the loss of a net on examples that no level sees.

    Args:
        held_out: the examples; none, if nothing is chosen.
    """

    def __init__(self, held_out: Examples | None) -> None:
        self.held_out = held_out
        self.states: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        if self.held_out is not None:
            with torch.no_grad():
                self.losses.append(baselines.cross_entropy(self.held_out)(pl_module.net).item())

    def best(self) -> dict[str, Tensor]:
        """Return the state where the held-out loss was the least."""
        return self.states[min(range(len(self.losses)), key=self.losses.__getitem__)]

    def mean(self) -> dict[str, Tensor]:
        """Return the mean of the states over the second half of the steps, with the last net."""
        half, last = self.states[len(self.states) // 2 :], self.states[-1]
        return {
            name: value if name.startswith("net.") else torch.stack([state[name] for state in half]).mean(0)
            for name, value in last.items()
        }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--steps", type=int, default=STEPS, help="of a net (%(default)s)")
    parser.add_argument("--outer-steps", type=int, default=OUTER_STEPS, help="of the outer level (%(default)s)")
    args = script.begin(parser, argv)
    settings = {"steps": args.steps, "outer_steps": args.outer_steps, "inner_steps": INNER_STEPS, **SETTING._asdict()}
    settings["prior"] = PRIOR
    results: dict[str, Any] = {}
    for seed in args.seeds:
        for weights in ("table", "net"):
            found = {name: judged(weights, remedy, seed, args) for name, remedy in REMEDIES.items()}
            print(weights, seed, {name: f"{100 * row['with trusted']:.1f}" for name, row in found.items()}, flush=True)
            results = keep("outer_overfitting", settings, found, weights, str(seed))
    return results


def judged(weights: str, remedy: Remedy, seed: int, args: Any) -> dict[str, float]:
    """Return the accuracies that one kind of weights leads to with one remedy, and its CPU seconds."""
    data = cleaning_data(SETTING, seed)
    pl.seed_everything(seed, verbose=False)
    task = data.task(WEIGHTS["table"](SETTING.num_train).net, args.steps)
    trusted, test = task.trusted, Examples(*data.test.tensors)
    one, other = next(baselines.folds(trusted, 2))
    runs: list[tuple[Examples, Examples | None, Examples | None]] = {
        0: [(trusted, trusted if remedy.inside else None, None)],
        1: [(one, None, other)],
        2: [(one, other, None), (other, one, None)],
    }[remedy.halves]
    began = time.process_time()
    modules = [learned(weights, remedy, task, *parts, seed, args.outer_steps) for parts in runs]
    seconds = time.process_time() - began
    logits = torch.stack([module.learned_logits(task.noisy) for module in modules]).mean(0)
    weighted = task.noisy.weighted(logits.sigmoid())
    return {
        "trusted": baselines.accuracy(modules[0].net, trusted),
        "own net": baselines.accuracy(modules[0].net, test),
        "weights alone": baselines.accuracy(baselines.train(task, weighted), test),
        "with trusted": baselines.accuracy(baselines.train(task, weighted + trusted), test),
        "CPU seconds": seconds,
    }


def learned(
    weights: str,
    remedy: Remedy,
    task: Task,
    outer: Examples,
    inside: Examples | None,
    held_out: Examples | None,
    seed: int,
    outer_steps: int,
) -> DataCleaning:
    """Return the module after a run: what is in the outer loss, in the inner loss, and in none."""
    pl.seed_everything(seed, verbose=False)
    module = with_prior(WEIGHTS[weights], remedy.prior)(
        num_examples=len(task.noisy.y), inner_steps=remedy.horizon * INNER_STEPS, inner_lr=task.lr
    )
    module.net.load_state_dict(task.start.state_dict())
    parts = [(task.noisy.x, task.noisy.y, torch.arange(len(task.noisy.y)))]
    if inside is not None:
        parts.append((inside.x, inside.y, torch.full_like(inside.y, -1)))
    inner = tuple(map(torch.cat, zip(*parts, strict=True)))
    steps = DataLoader([Episode([inner], outer[:2])] * outer_steps, batch_size=None)
    watch = Watch(held_out)
    with report.screen(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You defined a `validation_step`")  # the test images of the example
        fits.fit(module, steps, ReverseUnroll(), watch, max_epochs=1)
    if held_out is not None:
        module.load_state_dict(watch.best())
    if remedy.averaged:
        module.load_state_dict(watch.mean())
    return module


def with_prior(kind: type[DataCleaning], prior: float) -> type[DataCleaning]:
    """Return the module with the mean square of what is learned in its outer loss."""

    class Prior(kind):  # type: ignore[valid-type,misc]
        def outer_loss(self, batch):
            learned = torch.cat([parameter.flatten() for parameter in self.outer_parameters()])
            return super().outer_loss(batch) + prior * learned.square().mean()

    return Prior if prior else kind


if __name__ == "__main__":
    main()
