"""What does an estimate cost against the number of inner steps T, with every strategy?

CPU seconds and peak memory for T from 1 to 1024, on a perceptron 784-128-10 with batches of 50 (M = 101,770), inner
gradient descent, and N = 4 outer parameters, so few that `ForwardUnroll` can take part. (`FSLA` is not here: it takes
one inner step by design.) Beside them stands the inner run alone, in plain PyTorch.

One thread; all take turns, the least of each counts; memory is the peak of a process forked for it. What has been
measured for other T and strategies before is kept.

    python benchmarks/cost/cost_against_depth.py
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
from support.problems import episodes, module, perceptron_net, plain_run

NAME = "cost_against_depth"
NET, WEIGHTS = perceptron_net(784, 128, 10, examples=50), 4
LONG = 1024


def runs(inner_steps: int, chosen: Sequence[str]) -> dict[str, Callable[[], Any]]:
    problem, episode = module(NET, inner_steps, WEIGHTS), episodes(NET, 1, WEIGHTS)[0]
    found: dict[str, Callable[[], Any]] = {PLAIN: partial(plain_run, problem, episode)}
    for name, each in STRATEGIES.items():
        found[name] = partial(hypergradient, problem, each.make(), episode)
    return {name: found[name] for name in chosen}


def main(argv: Sequence[str] | None = None) -> dict[int, Row]:
    parser = script.options(__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 4, 16, 64, 256, LONG])
    parser.add_argument("--seconds", type=float, default=5, help="CPU seconds for the times at one T (%(default)s)")
    parser.add_argument("--strategies", nargs="+", choices=[PLAIN, *STRATEGIES], default=[PLAIN, *STRATEGIES])
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    args = script.begin(parser, argv)
    warnings.filterwarnings("ignore", message="`ConjugateGradient")  # 10 steps are no solution; they are a cost
    settings, small = {"net": NET.text, "N": WEIGHTS}, runs(1, args.strategies)
    rows: dict[int, Row] = {}
    for inner_steps in args.depths if "MiB" in args.what else ():
        peaks = {name: peak(run, small[name]) for name, run in runs(inner_steps, args.strategies).items()}
        rows = kept(NAME, inner_steps, "MiB", peaks, settings)
    for inner_steps in args.depths if "seconds" in args.what else ():
        turns = 1 if inner_steps >= LONG else 2
        seconds = least_seconds(runs(inner_steps, args.strategies), turns, args.seconds, warm_up=turns > 1)
        rows = kept(NAME, inner_steps, "seconds", seconds, settings)
    draw(NAME, "inner steps T", 2, rows)
    return rows


if __name__ == "__main__":
    main()
