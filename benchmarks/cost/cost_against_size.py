"""What does an estimate cost against the number of outer parameters N, with every strategy?

CPU seconds and peak memory for N from 10 to a million example weights, of which an inner batch of 100 touches 100; a
perceptron 784-256-10 (M = 203,530), T = 5 inner steps of gradient descent. `ForwardUnroll`, whose cost grows with N,
stops at N = 100.

One thread; all take turns, the least of each counts; memory is the peak of a process forked for it. What has been
measured for other N before is kept.

    python benchmarks/cost/cost_against_size.py
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_bilevel import hypergradient

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.curves import PLAIN, STRATEGIES, WHAT, Row, draw, kept
from support.measure import least_seconds, peak
from support.problems import NETS, episodes, module, plain_run

NAME = "cost_against_size"
NET, STEPS, MOST_TANGENTS = NETS["MLP"], 5, 100


def runs(size: int, inner_steps: int = STEPS) -> dict[str, Callable[[], Any]]:
    problem, episode = module(NET, inner_steps, size), episodes(NET, 1, size)[0]
    found: dict[str, Callable[[], Any]] = {PLAIN: partial(plain_run, problem, episode)}
    for name, each in STRATEGIES.items():
        if size <= MOST_TANGENTS or "ForwardUnroll" not in name:
            found[name] = partial(hypergradient, problem, each.make(), episode)
    return found


def main(argv: Sequence[str] | None = None) -> dict[int, Row]:
    parser = script.options(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**power for power in range(1, 7)])
    parser.add_argument("--seconds", type=float, default=2, help="CPU seconds for the times at one N (%(default)s)")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    args = script.begin(parser, argv)
    warnings.filterwarnings("ignore", message="`ConjugateGradient")  # 10 steps are no solution; they are a cost
    settings, small = {"net": NET.text, "T": STEPS}, runs(10, inner_steps=1)
    rows: dict[int, Row] = {}
    for size in args.sizes if "MiB" in args.what else ():
        peaks = {name: peak(run, small[name]) for name, run in runs(size).items()}
        rows = kept(NAME, size, "MiB", peaks, settings)
    for size in args.sizes if "seconds" in args.what else ():
        rows = kept(NAME, size, "seconds", least_seconds(runs(size), 2, args.seconds), settings)
    draw(NAME, "outer parameters N", 10, rows)
    return rows


if __name__ == "__main__":
    main()
