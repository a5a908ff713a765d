"""One run of `maml.py` or `anil.py`: options, training, adaptation curve, table, figure."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

import report
from few_shot import baselines, data, picture
from few_shot.learners import Level, MeanWithInterval, MetaLearner, adaptation_curve
from lightning_bilevel import (
    PZOBO,
    Episode,
    FirstOrder,
    ForwardGradient,
    GammaGreedy,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    TruncatedReverse,
)
from lightning_bilevel.few_shot import TaskLoader
from lightning_bilevel.linear_solvers import ConjugateGradient

STRATEGIES: Mapping[str, Callable[[], HypergradientStrategy]] = {
    "reverse": lambda: ReverseUnroll(),
    "first-order": lambda: FirstOrder(),
    "implicit": lambda: ImplicitGradient(ConjugateGradient(max_iter=10, tol=1e-2)),
    "gamma-greedy": lambda: GammaGreedy(gamma=0.99),
    "pzobo": lambda: PZOBO(num_directions=4, mu=0.01),
    "truncated": lambda: TruncatedReverse(steps=1),
    "forward": lambda: ForwardGradient(num_directions=16),
}


CHOSEN = ("inner_steps", "inner_lr", "outer_lr", "proximal", "learn_rates")
"""Options that a module takes as they are."""


def parser(description: str | None, default_data: str) -> argparse.ArgumentParser:
    """Return the options of both examples."""
    options = report.options(description)
    add = options.add_argument
    add("--data", default=default_data, help="sinusoid, digits, omniglot, cifar100 or learn2learn:NAME (%(default)s)")
    add("--data-dir", type=Path, help="folder with the files of the data")
    add("--strategy", choices=STRATEGIES, default="reverse", help="(%(default)s)")
    add("--ways", type=int, help="classes in a task")
    add("--shots", type=int, help="support examples of each class")
    add("--queries", type=int, help="query examples of each class in training")
    add("--steps", type=int, help="outer steps")
    add("--tasks", type=int, help="tasks in an outer step")
    add("--inner-steps", type=int, help="inner steps in training")
    add("--test-steps", type=int, nargs="+", default=[0, 1, 2, 3, 5, 10], help="where the curve has points")
    add("--inner-lr", type=float, help="learning rate of the inner steps")
    add("--outer-lr", type=float, help="learning rate of Adam, which falls to 0 as a cosine")
    add("--proximal", type=float, help="λ of λ/2 ‖θ − φ‖² in the inner loss; `implicit` needs it, and has 2 or 20")
    add("--learn-rates", action="store_true", help="learn the inner learning rate of every parameter (Meta-SGD)")
    add("--channels", type=int, help="of the convolutions")
    add("--test-tasks", type=int, default=600, help="held-out tasks at the end (%(default)s)")
    add("--validate-every", type=int, help="outer steps between looks at 100 of them; by default a tenth of the run")
    add("--resume", type=Path, help="checkpoint to go on from, such as OUTPUT/NAME.ckpt")
    add("--accelerator", default="cpu", help="for the Trainer (%(default)s)")
    add("--quiet", action="store_true", help="no progress bar")
    return options


def settled(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what the command line leaves open."""
    defaults = {"inner_steps": 1, "proximal": 0.0, **data.defaults(args.data)}
    if args.strategy == "implicit":  # it wants an inner minimum, which a proximal term makes one
        defaults |= {"inner_steps": 10, "proximal": 20.0 if args.data == "sinusoid" else 2.0}
    if args.smoke:
        defaults |= {"steps": 4, "tasks": 2}
        args.test_tasks = min(args.test_tasks, 8)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.validate_every = args.validate_every or max(1, args.steps // 10)
    return args


def learner(args: argparse.Namespace, problem: data.Problem, inner: Level, outer: Level = "all") -> MetaLearner:
    """Return a module with its initial weights."""
    pl.seed_everything(args.seed, verbose=False)
    chosen = {key: getattr(args, key) for key in CHOSEN}
    return problem.learner(problem.net(), inner=inner, outer=outer, total_steps=args.steps, **chosen)


def train(
    args: argparse.Namespace, name: str, inner: Level, outer: Level = "all"
) -> tuple[MetaLearner, dict[str, Any], Episode]:
    """Meta-train and test; return the module and the results."""
    problem = data.load(args)
    module = learner(args, problem, inner, outer)
    trainer = pl.Trainer(
        max_epochs=1,  # of so many steps
        callbacks=[
            STRATEGIES[args.strategy](),
            # A copy of the state every time the held-out tasks are looked at; nothing is chosen by them.
            ModelCheckpoint(
                args.output, filename=name, every_n_train_steps=args.validate_every, enable_version_counter=False
            ),
        ],
        accelerator=args.accelerator,
        logger=CSVLogger(args.output, name=f"log/{name}", version=""),
        log_every_n_steps=max(1, args.steps // 200),
        val_check_interval=args.validate_every,
        limit_val_batches=100,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=not args.quiet,
    )
    began, cpu = time.perf_counter(), time.process_time()
    loaders = TaskLoader(problem.train, batch_size=args.tasks), TaskLoader(problem.test, batch_size=1)
    trainer.fit(module, *loaders, ckpt_path=args.resume)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    tasks = [problem.test[index] for index in range(len(problem.test))]
    log = Path(trainer.logger.log_dir)
    curves = report.logged(log) if (log / "metrics.csv").exists() else {}  # none where a finished run is resumed
    return (
        module,
        {
            "data": args.data,
            "strategy": args.strategy,
            **{key: getattr(args, key) for key in ("ways", "shots", "queries", "steps", "tasks", *CHOSEN, "seed")},
            "metric": module.metric,
            "test_tasks": len(tasks),
            "curve": adaptation_curve(module, tasks, args.test_steps),
            "without": without(problem, tasks),
            "during the run": curves.get(f"val_{module.metric}"),
            "seconds": seconds,
            "cpu seconds": cpu,
        },
        tasks[0],
    )


def without(problem: data.Problem, tasks: Sequence[Episode]) -> dict[str, dict[str, float]]:
    """Return the mean score of what needs no outer level, and half of its 95% interval."""
    training = [problem.train[index] for index in range(min(20, len(problem.train)))]
    found = {}
    for name, values in baselines.scores(tasks, training).items():
        scores = MeanWithInterval()
        scores.update(torch.tensor(values))
        found[name] = {key: value.item() for key, value in zip(("mean", "95%"), scores.compute(), strict=True)}
    return found


def main(
    name: str, inner: Level, default_data: str, description: str | None, argv: Sequence[str] | None
) -> dict[str, Any]:
    """Run an example; return its results."""
    args = settled(parser(description, default_data).parse_args(sys.argv[1:] if argv is None else argv))
    args.output.mkdir(parents=True, exist_ok=True)
    if args.data in ("sinusoid", "digits"):
        torch.set_num_threads(1)  # more gain nothing on nets this small
    stem = f"{name}_{args.data.replace(':', '_')}" + ("" if args.strategy == "reverse" else f"_{args.strategy}")
    with report.screen():
        module, results, task = train(args, stem, inner)
        figure = picture.draw(name.upper(), module, results, task, args.output / f"{stem}.png")
    path = args.output / f"{stem}.json"
    report.write_json(path, results)
    show(name.upper(), results, [figure, path])
    return results


def show(name: str, results: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Print the adaptation curve, and what needs no outer level."""
    unit = 100 if results["metric"] == "accuracy" else 1
    label = "accuracy %" if results["metric"] == "accuracy" else "squared error"
    curve = results["curve"]
    points = zip(curve["steps"], curve["mean"], curve["95%"], strict=True)
    rows = [[str(steps), f"{unit * mean:.2f}", f"± {unit * half:.2f}"] for steps, mean, half in points]
    for other, row in results["without"].items():
        rows.append([other, f"{unit * row['mean']:.2f}", f"± {unit * row['95%']:.2f}"])
    title = (
        f"{name} with `{results['strategy']}` on {results['data']}: {results['test_tasks']} held-out tasks, "
        f"{results['seconds']:.0f} s of training"
    )
    report.print_table(title, ["inner steps", label, "95% interval"], rows, files)
