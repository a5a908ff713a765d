"""Data cleaning on digits: learned weights against the strongest simple baselines, given the same trusted examples.

Every method sees the noisy and the trusted examples and the same start of the net, and trains a net by 300 steps of
gradient descent on all its examples. What is learned is learned in 60 outer steps of 10 inner ones, with settings that
are the same everywhere; then a net is trained like the others. What baselines choose, they choose on trusted examples
(`examples/cleaning/baselines.py`). A seed draws split, wrong labels and start for all: differences are paired.

    python benchmarks/papers/cleaning_baselines.py
    python benchmarks/papers/cleaning_baselines.py --settings "next 60%, 100" --seeds 0 1
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import pytorch_lightning as pl
from support import fits, script
from support.results import keep
from torchmetrics.functional.classification import binary_auroc

import report
from cleaning import baselines
from cleaning.baselines import BASELINES, Task
from data_cleaning import WEIGHTS, CleaningData, MatrixCleaning
from lightning_bilevel import ReverseUnroll

STEPS, OUTER_STEPS, INNER_STEPS = 300, 60, 10


class Setting(NamedTuple):
    """Wrong labels, and how many of each kind there are."""

    moved: bool
    corruption: float
    num_train: int
    num_trusted: int


SETTINGS = {
    "any 50%, 50": Setting(False, 0.5, 1200, 50),
    "any 60%, 50": Setting(False, 0.6, 1200, 50),
    "next 60%, 50": Setting(True, 0.6, 1200, 50),
    "next 60%, 100": Setting(True, 0.6, 1200, 100),
    "any 50%, 400": Setting(False, 0.5, 900, 400),
}
"""By what wrong labels are, their share, and the number of trusted examples; the last is that of the example."""


class Learned(NamedTuple):
    """What the outer level is, and whether trusted examples are in the inner loss too."""

    weights: str
    inside: bool


LEARNED = {
    "table": Learned("table", inside=False),
    "table, trusted inside": Learned("table", inside=True),
    "net": Learned("net", inside=False),
    "net, trusted inside": Learned("net", inside=True),
    "matrix, trusted inside": Learned("matrix", inside=True),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--steps", type=int, default=STEPS, help="of a net (%(default)s)")
    parser.add_argument("--outer-steps", type=int, default=OUTER_STEPS, help="of the outer level (%(default)s)")
    args = script.begin(parser, argv)
    settings = {
        **{name: getattr(args, name) for name in ("steps", "outer_steps")},
        "inner_steps": INNER_STEPS,
        **{name: setting._asdict() for name, setting in SETTINGS.items()},
    }
    results: dict[str, Any] = {}
    for seed in args.seeds:
        for name in args.settings:
            found = compare(SETTINGS[name], seed, args.steps, args.outer_steps)
            print(name, seed, {method: f"{100 * value:.1f}" for method, value in found["accuracy"].items()}, flush=True)
            results = keep("cleaning_baselines", settings, found, name, str(seed), order=SETTINGS)
    return results


def compare(setting: Setting, seed: int, steps: int, outer_steps: int) -> dict[str, Any]:
    """Return the test accuracy of every method and its CPU seconds, and more about what was learned."""
    data = cleaning_data(setting, seed)
    pl.seed_everything(seed, verbose=False)
    task = data.task(WEIGHTS["table"](setting.num_train).net, steps)
    test = baselines.Examples(*data.test.tensors)
    accuracy, seconds, learned = {}, {}, {}
    for name, baseline in BASELINES.items():
        began = time.process_time()
        accuracy[name] = baselines.accuracy(baseline(task), test)
        seconds[name] = time.process_time() - began
    for name, kind in LEARNED.items():
        began = time.process_time()
        module = learn(kind, setting, task, seed, outer_steps)
        accuracy[name] = baselines.accuracy(module.retrained(task), test)
        seconds[name] = time.process_time() - began
        logits = module.learned_logits(task.noisy)
        alone = baselines.train(task, task.noisy.weighted(logits.sigmoid()))
        learned[name] = {
            "own net": baselines.accuracy(module.net, test),
            "weights alone": baselines.accuracy(alone, test),
            "trusted accuracy": baselines.accuracy(module.net, task.trusted),
            "auroc": binary_auroc(-logits, data.is_wrong.long()).item(),
        }
    accuracy["right labels"] = baselines.accuracy(baselines.train(task, task.noisy.take(~data.is_wrong)), test)
    return {"accuracy": accuracy, "learned": learned, "CPU seconds": seconds}


def cleaning_data(setting: Setting, seed: int, **options: Any) -> CleaningData:
    """Return the data of a seed."""
    data = CleaningData(
        corruption=setting.corruption,
        moved=setting.moved,
        num_train=setting.num_train,
        num_validation=setting.num_trusted,
        seed=seed,
        **options,
    )
    data.setup()
    return data


def learn(kind: Learned, setting: Setting, task: Task, seed: int, outer_steps: int) -> Any:
    """Return the module after its run, from the start that all have."""
    pl.seed_everything(seed, verbose=False)
    module = WEIGHTS[kind.weights](num_examples=setting.num_train, inner_steps=INNER_STEPS, inner_lr=task.lr)
    module.net.load_state_dict(task.start.state_dict())
    if isinstance(module, MatrixCleaning):
        module.start_from(task)
    data = cleaning_data(setting, seed, inside=kind.inside, steps_per_epoch=outer_steps)
    with report.screen():
        fits.fit(module, data, ReverseUnroll(), max_epochs=1)
    return module


if __name__ == "__main__":
    main()
