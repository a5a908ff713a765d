"""The tasks that `--data` names, with a net and a setting that suit them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from few_shot.cifar100 import load_cifar100
from few_shot.learn2learn_tasks import Learn2LearnTasks, load_taskset
from few_shot.learners import FewShotClassifier, FewShotRegressor, MetaLearner
from few_shot.nets import BodyAndHead, cnn, mlp
from few_shot.omniglot import load_omniglot
from few_shot.sinusoid import Sinusoids
from image_data import load_digits
from lightning_bilevel.few_shot import FewShotTasks, TaskDataset

CLASSIFICATION = {"ways": 5, "shots": 1, "queries": 3, "tasks": 16, "inner_lr": 0.4, "outer_lr": 3e-3}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "sinusoid": {
        "ways": 1,
        "shots": 10,
        "queries": 10,
        "tasks": 25,
        "inner_lr": 0.01,
        "outer_lr": 1e-3,
        "steps": 10_000,
    },
    "digits": {**CLASSIFICATION, "queries": 5, "steps": 1000},
    "omniglot": {**CLASSIFICATION, "steps": 4500},
    "cifar100": {**CLASSIFICATION, "inner_lr": 0.1, "steps": 10_000},
    "learn2learn": {**CLASSIFICATION, "inner_lr": 0.1, "steps": 10_000},
}
"""Settings where the command line leaves them open: of a task, of the run."""

TEST_QUERIES = 15
"""Query examples of each class in a test task."""

TRAIN_DIGITS, TEST_DIGITS = (0, 1, 2, 5, 6, 8), (3, 4, 7, 9)  # none of the held-out ones looks like itself turned
QUARTER_TURNS = {"rotations": (0, 1, 2, 3)}


class Images(NamedTuple):
    """Images (n, channels, height, width) and labels, to train and to test on; and arguments for ``FewShotTasks``."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    options: Mapping[str, Any]
    test_options: Mapping[str, Any]


class Problem(NamedTuple):
    """Tasks to train on, tasks to test on (fixed ones, of other classes), and what learns them."""

    train: TaskDataset
    test: TaskDataset
    learner: type[MetaLearner]
    net: Callable[[], BodyAndHead]


def defaults(name: str) -> Mapping[str, Any]:
    """Return the settings of ``--data NAME``."""
    kind = name.split(":")[0]
    if kind not in DEFAULTS or (kind == "learn2learn") != (":" in name):
        names = ", ".join([*(each for each in DEFAULTS if each != "learn2learn"), "learn2learn:NAME"])
        raise SystemExit(f"Expected `--data` to be one of {names}, got {name}.")
    return DEFAULTS[kind]


def load(args: argparse.Namespace) -> Problem:
    """Return the problem that ``args.data`` names."""
    sizes = {"shots": args.shots, "queries": args.queries}
    train = {**sizes, "num_tasks": args.steps * args.tasks, "seed": args.seed}
    test = {**sizes, "num_tasks": args.test_tasks, "seed": args.seed + 1, "fixed": True, "queries": TEST_QUERIES}
    if args.data == "sinusoid":
        return Problem(Sinusoids(**train), Sinusoids(**{**test, "queries": 100}), FewShotRegressor, mlp)
    if args.data.startswith("learn2learn:"):
        sets = [from_learn2learn(args, part, options) for part, options in (("train", train), ("test", test))]
    else:
        found = images(args.data, args.data_dir)
        sets = [
            FewShotTasks(*found.train, ways=args.ways, **found.options, **train),
            FewShotTasks(*found.test, ways=args.ways, **found.test_options, **test),
        ]
    shape = sets[0][0].inner[0][0].shape
    blocks = 3 if shape[-1] < 10 else 4
    channels = args.channels or (32 if shape[-1] < 10 else 64)
    return Problem(*sets, FewShotClassifier, lambda: cnn(args.ways, shape[1], channels, blocks, pool=shape[1] == 3))


def images(name: str, folder: Path | None, size: int = 28) -> Images:
    """Return digits, Omniglot at so many pixels a side, or CIFAR-100.

    Digits and Omniglot hold out whole characters, CIFAR-100 half of the classes, drawn once and for all.
    """
    if name == "digits":
        split = load_digits()
        x = torch.cat([split.train_x, split.test_x]).view(-1, 1, 8, 8)
        both = x, torch.cat([split.train_y, split.test_y])
        return Images(both, both, {"classes": TRAIN_DIGITS, **QUARTER_TURNS}, {"classes": TEST_DIGITS, **QUARTER_TURNS})
    if folder is None:
        raise SystemExit(f"`--data {name}` needs `--data-dir`, the folder with its files.")
    if name == "omniglot":
        return Images(load_omniglot(folder, "train", size), load_omniglot(folder, "test", size), QUARTER_TURNS, {})
    both = load_cifar100(folder)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    present = set(both[1].unique().tolist())
    halves = ([label for label in half if label in present] for half in (order[:50], order[50:]))
    return Images(both, both, *({"classes": half} for half in halves))


def from_learn2learn(args: argparse.Namespace, part: str, options: Mapping[str, Any]) -> Learn2LearnTasks:
    """Return a named task set of learn2learn as tasks."""
    options = dict(options)
    folder = args.data_dir or Path("data")
    taskset = load_taskset(args.data.split(":")[1], part, folder, args.ways, args.shots, options.pop("queries"))
    return Learn2LearnTasks(taskset, **options)
