"""Table 2 of the γ-greedy paper in kind: cheap hypergradients for features on which a linear head is trained.

A body of 3 convolutions of 32 channels is the outer level, a linear head the inner one: T = 10 steps of SGD (0.1,
momentum 0.9) from one fixed start, 10 shots and 10 queries, 10 tasks in an outer step, 200 outer steps of Adam at 1e-3.
Accuracy on held-out classes after the same 10 steps. The paper has CIFAR-100 and 20 seeds; here it is digits with
quarter turns, and Omniglot at 14×14 with `--data-dir`; CIFAR-100 with `--data cifar100` where it is at hand.

    python benchmarks/papers/gamma_greedy_table.py
    python benchmarks/papers/gamma_greedy_table.py --data omniglot --data-dir FOLDER --ways 5
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_bilevel import (
    FirstOrder,
    GammaGreedy,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    TruncatedReverse,
)
from lightning_bilevel.few_shot import FewShotTasks, TaskLoader
from lightning_bilevel.linear_solvers import Neumann

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.fits import fit
from support.intervals import interval
from support.results import keep

import report
from few_shot import data
from few_shot.learners import FewShotClassifier, adaptation_curve
from few_shot.nets import cnn

METHODS: Mapping[str, Callable[[], HypergradientStrategy]] = {
    "FO": lambda: FirstOrder(),
    "T1–T2": lambda: TruncatedReverse(steps=1),
    "IFT, 10 terms": lambda: ImplicitGradient(Neumann(terms=10, step_size=0.1)),
    "γ = 0.99": lambda: GammaGreedy(gamma=0.99),
    "reverse": lambda: ReverseUnroll(),  # not in the paper's table: what the others approximate
}


def accuracy(
    method: str, problem: data.Images, ways: int, seed: int, steps: int, test_tasks: int
) -> tuple[float, float]:
    """Return the accuracy on held-out classes, and the CPU seconds of training."""
    pl.seed_everything(seed, verbose=False)
    torch.manual_seed(seed)
    sizes = {"ways": ways, "shots": 10, "queries": 10}
    train = FewShotTasks(*problem.train, **problem.options, **sizes, num_tasks=10 * steps, seed=seed)
    test = FewShotTasks(*problem.test, **problem.test_options, **sizes, num_tasks=test_tasks, seed=1000 + seed)
    net = cnn(ways, in_channels=problem.train[0].shape[1], channels=32, blocks=3)
    setting = {"inner_steps": 10, "inner_lr": 0.1, "inner_momentum": 0.9, "outer_lr": 1e-3}
    module = FewShotClassifier(net, inner="head", outer="body", **setting)
    if problem.train[0].shape[-1] < 10:
        module.episode_chunk_size = 10  # small images of all tasks in one call are twice as fast
    began = time.process_time()
    fit(module, TaskLoader(train, batch_size=10), METHODS[method](), max_steps=steps)
    seconds = time.process_time() - began
    return adaptation_curve(module, [test[index] for index in range(test_tasks)], [10])["mean"][0], seconds


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--data", choices=("digits", "omniglot", "cifar100"), default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--ways", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--test-tasks", type=int, default=100)
    args = script.begin(parser, argv)
    problem = data.images(args.data, args.data_dir, size=14)
    for seed in args.seeds:
        for ways in args.ways:
            for method in args.methods:
                with report.screen():
                    found, seconds = accuracy(method, problem, ways, seed, args.steps, args.test_tasks)
                settings = {"steps": args.steps, "test tasks": args.test_tasks}
                each = {"accuracy": found, "cpu seconds": seconds}
                # Kept seed by seed, so that a run can be cut into parts.
                results = keep("gamma_greedy_table", settings, each, args.data, f"{ways}-way", method, str(seed))
                row = results[args.data][f"{ways}-way"][method]
                over_seeds = interval([each["accuracy"] for each in row.values()])
                mean, half = over_seeds["mean"], over_seeds["half_width"] or 0.0
                shown = f"{100 * mean:.2f} ± {100 * half:.2f}, n = {len(row)}"
                print(f"{args.data} {ways}-way {method:14s} {shown}", flush=True)
    return results


if __name__ == "__main__":
    main()
