"""Do long inner runs cost what the arithmetic says?

Recomputation: `ReverseUnroll("sqrt")` runs nearly all inner steps once more, without a graph. So it should take 1 + F /
R times as long as `ReverseUnroll()`, which takes R, where F is `FirstOrder()`: the inner run and one gradient; and its
memory should grow as the root of T. Measured at T = 1024 (time), and from T = 64 to 1024 (memory), on a perceptron
784-256-10 with batches of 100.

Forward gradients: the peak memory of `ForwardGradient(8)` should be the same at T = 10 and at T = 1000.

CPU seconds of one thread, in turns, the least of each; memory is the peak of a process forked for it. What has been
measured of the other parts before is kept.

    python benchmarks/cost/long_runs.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lightning_bilevel import FirstOrder, ForwardGradient, HypergradientStrategy, ReverseUnroll, hypergradient

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.curves import PLAIN
from support.measure import least_seconds, peak
from support.problems import NETS, episodes, module, plain_run
from support.results import keep

NAME = "long_runs"
NET = NETS["MLP"]
DIRECTIONS, FEW_AND_MANY = 8, (10, 1000)


def estimate(strategy: HypergradientStrategy, inner_steps: int) -> Callable[[], Any]:
    return partial(hypergradient, module(NET, inner_steps), strategy, episodes(NET, 1)[0])


def recomputation(depth: int, repeats: int) -> dict[str, Any]:
    """Return the times at T = ``depth``, and what they should be."""
    runs = {
        "ReverseUnroll()": estimate(ReverseUnroll(), depth),
        'ReverseUnroll("sqrt")': estimate(ReverseUnroll("sqrt"), depth),
        "FirstOrder()": estimate(FirstOrder(), depth),
        PLAIN: partial(plain_run, module(NET, depth), episodes(NET, 1)[0]),
    }
    seconds = least_seconds(runs, repeats, warm_up=False)
    reverse, rooted, forward, _ = seconds.values()
    return {
        "T": depth,
        "seconds": seconds,
        "sqrt over reverse": rooted / reverse,
        "should be": 1 + forward / reverse,
        "reverse over inner run": reverse / forward,
    }


def memory(depth: int, _: int) -> dict[str, Any]:
    """Return the peak memory of both over T, and the exponents of T in them."""
    depths = [depth // 16, depth // 8, depth // 4, depth // 2, depth]
    found: dict[str, Any] = {"T": depths}
    for name, checkpoint in (("ReverseUnroll()", None), ('ReverseUnroll("sqrt")', "sqrt")):
        strategy = ReverseUnroll(checkpoint)  # type: ignore[arg-type]
        peaks = [peak(estimate(strategy, depth), estimate(strategy, 1)) for depth in depths]
        found[name] = {"MiB": peaks, "exponent": float(np.polyfit(np.log(depths), np.log(peaks), 1)[0])}
    return found


def forward_gradient(*_: int) -> dict[str, Any]:
    """Return the peak memory of `ForwardGradient` at both T."""
    strategy = ForwardGradient(DIRECTIONS)
    few, many = (peak(estimate(strategy, depth), estimate(strategy, 1)) for depth in FEW_AND_MANY)
    return {"b": DIRECTIONS, "T": FEW_AND_MANY, "MiB": [few, many], "ratio": many / few}


PARTS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "memory": memory,
    "forward gradient": forward_gradient,
    "recomputation": recomputation,
}
"""Memory is best measured before anything is timed."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--depth", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = script.begin(parser, argv)
    results: dict[str, Any] = {}
    for name in args.parts:
        found = PARTS[name](args.depth, args.repeats)
        print(name, found, flush=True)
        results = keep(NAME, {"net": NET.text, "depth": args.depth}, found, name)
    return results


if __name__ == "__main__":
    main()
