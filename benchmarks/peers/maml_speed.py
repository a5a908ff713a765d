"""One meta-step of MAML: this library in a Trainer, against programs written for five others.

Sinusoids (MLP 1-40-40-1, 25 tasks of 10 + 10 points, 5 inner steps), images (28×28, 4 strided blocks of 32 channels,
4 tasks of 5 ways and 5 + 3 examples, 5 inner steps), and ANIL on the latter. A meta-step is the meta-gradient and a
step of Adam; ours includes everything the Trainer does for a batch, logging too, unless it is barebones. All take the
same tasks. How far their gradients are from ours is measured first: who has another one is not timed. One thread, CPU
seconds of the process; the contenders take turns, and the least of all their steps counts.

    python benchmarks/peers/maml_speed.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lightning_bilevel import Episode, ReverseUnroll, hypergradient, tree
from lightning_bilevel.few_shot import TaskLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.few_shot_problems import images, sinusoids
from support.fits import Stopwatch, fit
from support.maml_peers import PEERS, Gradient
from support.measure import cpu_seconds, turns
from support.results import plot, save

import report
from few_shot.learners import MetaLearner

MOST = 1e-3
"""Difference of two gradients that are one: who has another one is not timed."""

Problem = Callable[[], tuple[MetaLearner, TaskLoader]]


def differences(make: Problem) -> dict[str, float]:
    """Return how far each peer's gradient is from ours, relative to its length."""
    module, loader = make()
    tasks = next(iter(loader))
    ours = hypergradient(module, ReverseUnroll(), tasks).grads
    found: dict[str, float] = {}
    for name, peer in PEERS.items():
        module.zero_grad()
        peer(module, tasks)
        theirs = {key: value.grad for key, value in module.named_parameters()}
        found[name] = float(tree.norm(tree.sub(ours, theirs)) / tree.norm(ours))
    return found


def time_ours(make: Problem, steps: int, barebones: bool = False, compiled: bool = False) -> float:
    """Return the seconds of the fastest step."""
    module, loader = make()
    module.compiles_steps = compiled
    stopwatch = Stopwatch()
    with report.screen():
        fit(module, loader, ReverseUnroll(), stopwatch, max_steps=steps, barebones=barebones)
    return min(stopwatch.seconds)


def time_peer(peer: Gradient, make: Problem, steps: int) -> float:
    module, loader = make()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def step(tasks: Sequence[Episode]) -> None:
        optimizer.zero_grad()
        peer(module, tasks)
        optimizer.step()

    return min(cpu_seconds(partial(step, tasks)) for tasks in islice(loader, steps))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=6, help="meta-steps in a turn")
    args = script.begin(parser, argv)
    torch.manual_seed(0)

    results: dict[str, Any] = {}
    for problem, make in {"sinusoids": sinusoids, "images": images}.items():
        differ = differences(make)
        alike = [name for name, difference in differ.items() if difference <= MOST]
        contenders = {"lightning_bilevel": lambda make=make: time_ours(make, args.steps)}
        contenders |= {name: lambda p=PEERS[name], make=make: time_peer(p, make, args.steps) for name in alike}
        contenders["lightning_bilevel, barebones"] = lambda make=make: time_ours(make, args.steps, barebones=True)
        contenders["lightning_bilevel, compiled"] = lambda make=make: time_ours(make, args.steps, compiled=True)
        if problem == "images":
            contenders["lightning_bilevel, ANIL"] = lambda: time_ours(lambda: images("head"), args.steps)
        *_, best = islice(turns(contenders), args.rounds)
        fastest = min(best[name] for name in alike)
        results[problem] = {
            "cpu seconds": best,
            "of the fastest peer": best["lightning_bilevel"] / fastest,
            "difference of the gradient": differ,
        }
        for name, value in best.items():
            print(f"{problem:10s} {name:26s} {1000 * value:8.2f} ms", flush=True)
        print(f"{problem:10s} {'of the fastest peer':26s} {results[problem]['of the fastest peer']:8.3f}")
    both = results["images"]["cpu seconds"]
    results["MAML / ANIL"] = both["lightning_bilevel"] / both["lightning_bilevel, ANIL"]
    print(f"MAML takes {results['MAML / ANIL']:.2f} times as long as ANIL")
    peers = {name: version(name.lower()) for name in PEERS}
    save("maml_speed", {**vars(args), "peers": peers}, results)

    with plot("maml_speed", 1, 2, size=(9, 2.8)) as (_, panels):
        for axes, (problem, title) in zip(
            panels, (("sinusoids", "Sinusoids"), ("images", "28×28 images")), strict=True
        ):
            best = results[problem]["cpu seconds"]
            names = sorted(best, key=best.get, reverse=True)
            colors = [report.BLUE if name.startswith("lightning") else report.GREY for name in names]
            bars = axes.barh(names, [1000 * best[name] for name in names], color=colors)
            axes.bar_label(bars, fmt="%.0f", padding=3)
            axes.set(title=title, xlabel="CPU milliseconds per meta-step")
            axes.grid(axis="y", visible=False)
    return results


if __name__ == "__main__":
    main()
