"""Few-shot learning against what needs no outer level, on the very tasks of the scripts named here.

sinusoids  Of `sinusoid_maml`: a Gaussian process whose kernel, of smooth functions, is fitted to 20 training tasks.
digits, omniglot  Of `gamma_greedy_table`: a net like the one there is trained to tell all training classes apart, for
           as many CPU seconds as `ReverseUnroll` took; a ridge regression, the means of the classes or the nearest
           neighbour judge its features, and the pixels.
28x28      Of `omniglot`: the same, for as many CPU seconds as the shortest run there, on tasks of 1 and 5 shots.

All read the results of those scripts, and pair by seed; `omniglot` has one.

    python benchmarks/papers/few_shot_baselines.py
    python benchmarks/papers/few_shot_baselines.py --parts omniglot 28x28 --data-dir FOLDER
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.results import earlier, keep

from few_shot import baselines, data, run
from few_shot.nets import cnn
from lightning_bilevel.few_shot import FewShotTasks, TaskDataset

WAYS = 5
SINUSOIDS = 200
"""Test tasks, as many as in the results of `sinusoid_maml`."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=("sinusoids", "digits"))
    parser.add_argument("--data-dir", type=Path, help="folder of Omniglot's npz files")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5), help="of those that the other scripts have")
    parser.add_argument("--test-tasks", type=int, default=100, help="of images (%(default)s, as the table has)")
    parser.add_argument("--seconds", type=float, help="in place of those of the table")
    args = script.begin(parser, argv)
    results: dict[str, Any] = {}
    limits = {"sinusoids": len(earlier("sinusoid_maml").get("runs", range(3))), "28x28": 1}
    for part in args.parts:
        for seed in args.seeds:
            if part in limits and seed >= limits[part]:
                continue
            found = PARTS[part](part, seed, args)
            print(part, seed, {name: f"{row['score']:.4f}" for name, row in found.items()}, flush=True)
            results = keep("few_shot_baselines", {"ways": WAYS, "test tasks": args.test_tasks}, found, part, str(seed))
    return results


def sinusoids(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the mean squared error of a Gaussian process on the test tasks of a seed."""
    options = run.settled(
        run.parser(None, "sinusoid").parse_args(["--seed", str(seed), "--test-tasks", str(SINUSOIDS)])
    )
    problem = data.load(options)
    tasks, training = (
        [each[index] for index in range(count)] for each, count in ((problem.test, SINUSOIDS), (problem.train, 20))
    )
    began = time.process_time()
    kernel = baselines.fitted(training)
    seconds = time.process_time() - began
    score = fmean(baselines.squared_error(kernel, task) for task in tasks)
    return {"Gaussian process": {"score": score, "CPU seconds": seconds, "kernel": str(kernel)}}


def images(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the mean accuracy on the test tasks of a seed, of every head on features and on pixels."""
    problem = data.images(name, args.data_dir, size=14)
    sizes = {"ways": WAYS, "shots": 10, "queries": 10}
    tasks = FewShotTasks(*problem.test, **problem.test_options, **sizes, num_tasks=args.test_tasks, seed=1000 + seed)
    table = earlier("gamma_greedy_table")[name][f"{WAYS}-way"]["reverse"][str(seed)]
    body, seconds = classifier(problem, args.seconds or table["cpu seconds"], seed, channels=32, blocks=3)
    return judged(body, seconds, tasks)


def as_in_maml(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the mean accuracy on the 600 test tasks of `omniglot`, of every head, for tasks of 1 and of 5 shots."""
    problem = data.images("omniglot", args.data_dir)
    longest = args.seconds or min(each["cpu seconds"] for each in earlier("omniglot").values())
    body, seconds = classifier(problem, longest, seed, channels=64, blocks=4)
    found = {}
    for shots in (1, 5):
        chosen = ["--shots", str(shots), "--seed", str(seed), "--data-dir", str(args.data_dir)]
        options = run.settled(run.parser(None, "omniglot").parse_args(chosen))
        rows = judged(body, seconds, data.load(options).test)
        found |= {f"{head}, {shots}-shot": row for head, row in rows.items()}
    return found


PARTS = {"sinusoids": sinusoids, "digits": images, "omniglot": images, "28x28": as_in_maml}


def classifier(
    problem: data.Images, longest: float, seed: int, channels: int, blocks: int
) -> tuple[torch.nn.Module, float]:
    """Return the body of a net that was trained to tell all training classes apart, and the CPU seconds it took."""
    x, y = training_set(problem)
    torch.manual_seed(seed)
    net = cnn(int(y.max()) + 1, in_channels=x.shape[1], channels=channels, blocks=blocks)
    began = time.process_time()
    return baselines.classifier(net, x, y, longest, seed), time.process_time() - began


def judged(body: torch.nn.Module, seconds: float, tasks: TaskDataset) -> dict[str, Any]:
    """Return the mean accuracy of every head, on features and on pixels, and half of its 95% interval over tasks."""
    found = {}
    for head in baselines.HEADS:
        for features, function, cost in (
            ("features of a classifier", body, seconds),
            ("pixels", torch.nn.Identity(), 0.0),
        ):
            each = [baselines.accuracy(function, head, tasks[index]) for index in range(len(tasks))]
            half = 1.96 * stdev(each) / len(each) ** 0.5
            found[f"{features}, {head}"] = {"score": fmean(each), "95%": half, "CPU seconds": cost}
    return found


def training_set(problem: data.Images) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images of the training classes, every quarter turn of a class a class of its own, and its number."""
    x, y = problem.train
    chosen = torch.as_tensor(problem.options.get("classes", y.unique()))
    kept = torch.isin(y, chosen)
    numbers = torch.searchsorted(chosen.sort().values, y[kept])
    turns = problem.options.get("rotations", (0,))
    turned = [torch.rot90(x[kept], turn, (-2, -1)) for turn in turns]
    return torch.cat(turned), torch.cat([numbers + len(chosen) * place for place in range(len(turns))])


if __name__ == "__main__":
    main()
