"""PZOBO against ANIL and MAML with a larger backbone: time to a given accuracy, and cost per meta-step.

The PZOBO paper's comparison (arXiv 2110.07004, section 4.3) in kind: ResNet-12, 5-way 5-shot. There: miniImageNet on a
GPU; here Omniglot at 28×28 and widths 8, 16, 32, 64 on one CPU thread. As there, PZOBO has the head as its inner level
and the body as its outer one. All take 5 inner steps, 4 tasks of 5 + 3 examples a class in a meta-step, and Adam at
1e-3; times are CPU seconds of training steps alone. Every method gets as many seconds.

    python benchmarks/papers/pzobo_backbone.py --data-dir FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch

from lightning_bilevel import (
    PZOBO,
    Episode,
    FirstOrder,
    HypergradientStrategy,
    ReverseUnroll,
    hypergradient,
    tree,
)
from lightning_bilevel.few_shot import FewShotTasks, TaskLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.fits import Stopwatch, fit
from support.results import plot, save

import report
from few_shot import data
from few_shot.learners import FewShotClassifier, adaptation_curve
from few_shot.nets import resnet12

WIDTHS, INNER_STEPS = (8, 16, 32, 64), 5


class Method(NamedTuple):
    """What is adapted, what is learned, and by which estimate."""

    inner: str
    outer: str
    strategy: Callable[[], HypergradientStrategy]


METHODS: Mapping[str, Method] = {
    "PZOBO": Method("head", "body", lambda: PZOBO(num_directions=1, mu=0.01)),
    "ANIL": Method("head", "all", lambda: ReverseUnroll()),
    "MAML": Method("all", "all", lambda: ReverseUnroll()),
}
COLORS = dict(zip(METHODS, (report.BLUE, report.GREEN, report.VERMILION), strict=True))


class Race(Stopwatch):
    """Measures training steps, looks at the test tasks now and then, and ends when the seconds are spent."""

    def __init__(self, seconds: float, tasks: Sequence[Episode]) -> None:
        super().__init__()
        self.limit, self.tasks = seconds, tasks
        self.curve: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: FewShotClassifier, *_: Any) -> None:
        super().on_train_batch_end()
        spent = sum(self.seconds)
        if spent >= self.limit * (len(self.curve) + 1) / 12:
            accuracy = adaptation_curve(pl_module, self.tasks, [INNER_STEPS])["mean"][0]
            self.curve.append((spent, accuracy))
            print(f"  {spent:6.0f} s  {len(self.seconds):5d} steps  {100 * accuracy:.1f}%", flush=True)
        trainer.should_stop = spent >= self.limit


def race(name: str, found: data.Images, args: argparse.Namespace) -> dict[str, Any]:
    print(name, flush=True)
    method = METHODS[name]
    pl.seed_everything(args.seed, verbose=False)
    sizes = {"ways": 5, "shots": 5}
    train = FewShotTasks(*found.train, **found.options, **sizes, queries=3, num_tasks=100_000, seed=args.seed)
    test = FewShotTasks(*found.test, **found.test_options, **sizes, num_tasks=args.test_tasks, seed=args.seed + 1)
    setting = {"inner_steps": INNER_STEPS, "inner_lr": args.inner_lr, "outer_lr": 1e-3}
    module = FewShotClassifier(resnet12(5, widths=WIDTHS), inner=method.inner, outer=method.outer, **setting)
    callback = Race(args.seconds, list(map(test.__getitem__, range(len(test)))))
    fit(module, TaskLoader(train, batch_size=4), method.strategy(), callback, max_epochs=1)
    reached = {
        str(goal): next((spent for spent, accuracy in callback.curve if accuracy >= goal), None) for goal in args.goals
    }
    return {
        "cpu seconds per meta-step": sum(callback.seconds) / len(callback.seconds),
        "meta-steps": len(callback.seconds),
        "parameters": sum(parameter.numel() for parameter in module.net.parameters()),
        "curve": callback.curve,
        "cpu seconds to reach": reached,
    }


def estimates(found: data.Images) -> dict[str, Any]:
    """Return how close PZOBO and the query loss's own gradient come to the exact one for the body, before training."""
    torch.manual_seed(0)
    tasks = FewShotTasks(*found.test, **found.test_options, ways=5, shots=5, queries=3, num_tasks=4)
    episodes = [tasks[index] for index in range(4)]
    net = resnet12(5, widths=WIDTHS)
    module = FewShotClassifier(net, inner="head", outer="body", inner_steps=INNER_STEPS, inner_lr=0.1)
    exact = hypergradient(module, ReverseUnroll(), episodes).grads
    rows: dict[str, Any] = {"outer parameters": tree.numel(exact)}
    for name, strategy in {
        "PZOBO, 1 direction": PZOBO(num_directions=1, mu=0.01),
        "PZOBO, 16 directions": PZOBO(num_directions=16, mu=0.01),
        "FirstOrder": FirstOrder(),
    }.items():
        grads = hypergradient(module, strategy, episodes).grads
        ratio = tree.norm(grads) / tree.norm(exact)
        cosine = tree.dot(grads, exact) / (tree.norm(grads) * tree.norm(exact))
        rows[name] = {"cosine": cosine.item(), "norm ratio": ratio.item()}
        print(f"{name}: cosine {cosine:.4f}, norm ratio {ratio:.2f}", flush=True)
    return rows


def draw(results: Mapping[str, Any]) -> None:
    with plot("pzobo_backbone", size=(5.6, 3.6)) as (_, axes):
        for name, color in COLORS.items():
            spent, accuracy = zip(*results[name]["curve"], strict=True)
            cost = results[name]["cpu seconds per meta-step"]
            label = f"{name}, {cost:.2f} s a meta-step"
            axes.plot(spent, [100 * value for value in accuracy], color=color, label=label)
        axes.set(title="ResNet-12 on Omniglot, 5-way 5-shot", xlabel="CPU seconds of training", ylabel="accuracy, %")
        axes.legend(loc="center right")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with Omniglot's npz files; without it, nothing is run")
    parser.add_argument("--seconds", type=float, default=150, help="CPU seconds of training for each method")
    parser.add_argument("--goals", type=float, nargs="+", default=[0.8, 0.85, 0.9])
    parser.add_argument("--inner-lr", type=float, default=0.1)
    parser.add_argument("--test-tasks", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = script.begin(parser, argv)
    if args.data_dir is None:
        print("Skipped: name the folder of Omniglot's npz files with --data-dir.")
        return {}
    found = data.images("omniglot", args.data_dir)
    with report.screen():
        settings = {key: value for key, value in vars(args).items() if key != "data_dir"}
        settings |= {"widths": WIDTHS, "inner steps": INNER_STEPS}
        first = estimates(found)
        results = {name: race(name, found, args) for name in METHODS}
        save("pzobo_backbone", settings, {"race": results, "first estimates": first})
        draw(results)
    for name, result in results.items():
        cost, reached = result["cpu seconds per meta-step"], result["cpu seconds to reach"]
        print(f"{name:6s} {cost:.2f} s a meta-step, to reach {reached}")
    return results


if __name__ == "__main__":
    main()
