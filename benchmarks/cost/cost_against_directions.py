"""What does one more direction cost?

CPU seconds and peak memory of `ForwardGradient(b)`, `PZOBO(b)` and `ZerothOrder(b)` for b from 1 to 16 on a perceptron,
a convolutional net with and without batch norm, and a small GPT-2, T = 3 inner steps of gradient descent, chunks as the
library chooses them. The unit is the inner run alone, in plain PyTorch: the slope of the least-squares line through the
seconds over b is what a direction costs. The design asks for at most 2.2 for `ForwardGradient`.

One thread; all b of a net take turns, the least of each counts; memory is the peak of a process forked for it. What has
been measured for other nets before is kept.

    python benchmarks/cost/cost_against_directions.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lightning_bilevel import PZOBO, ForwardGradient, ZerothOrder, hypergradient

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.curves import PLAIN, WHAT
from support.measure import least_seconds, peak
from support.problems import NETS, episodes, module, plain_run
from support.results import earlier, keep, plot

import report

NAME = "cost_against_directions"
CNN = NETS["CNN"]
CASES = {
    "MLP": NETS["MLP"],
    "CNN": CNN,
    "CNN, no norm": CNN._replace(text=f"{CNN.text}, no batch norm", make=lambda: without_norm(CNN.make())),
    "GPT-2": NETS["GPT-2"],
}
KINDS: dict[str, tuple[Callable[..., Any], str]] = {
    "ForwardGradient": (ForwardGradient, report.VERMILION),
    "PZOBO": (PZOBO, report.GREEN),
    "ZerothOrder": (ZerothOrder, report.BLUE),
}


def without_norm(net: nn.Module) -> nn.Module:
    """Take batch normalization out of a net, in place."""
    for child in net.modules():
        for name, layer in child.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                setattr(child, name, nn.Identity())
    return net


def estimates(name: str, numbers: Sequence[int], inner_steps: int) -> dict[tuple[str, int], Callable[[], Any]]:
    """Return an estimate for each kind and b."""
    (episode,), problem = episodes(CASES[name], 1), module(CASES[name], inner_steps)
    return {
        (kind, b): partial(hypergradient, problem, make(b), episode)
        for kind, (make, _) in KINDS.items()
        for b in numbers
    }


def peaks(name: str, numbers: Sequence[int], inner_steps: int) -> dict[str, Any]:
    """Return MiB over b for each kind."""
    runs, small = estimates(name, numbers, inner_steps), estimates(name, [1], 1)
    return {kind: {"MiB": [peak(runs[kind, b], small[kind, 1]) for b in numbers]} for kind in KINDS}


def times(name: str, numbers: Sequence[int], inner_steps: int, seconds: float) -> dict[str, Any]:
    """Return seconds over b for each kind, and the line through them in inner runs."""
    runs: dict[Any, Callable[[], Any]] = dict(estimates(name, numbers, inner_steps))
    runs[PLAIN] = partial(plain_run, module(CASES[name], inner_steps), episodes(CASES[name], 1)[0])
    least = least_seconds(runs, 3, seconds)
    found: dict[str, Any] = {PLAIN: least[PLAIN]}
    for kind in KINDS:
        each = [least[kind, b] for b in numbers]
        slope, first = (float(value) for value in np.polyfit(numbers, each, 1) / least[PLAIN])
        found[kind] = {"seconds": each, "a direction": slope, "none": first}
        print(f"{name:6s} {kind:16s} a direction costs {slope:.2f} inner runs; none, {first:.2f}", flush=True)
    return found


def kept(name: str, numbers: Sequence[int], inner_steps: int, found: dict[str, Any]) -> dict[str, Any]:
    """Put what was found for a net into the results, beside what is there, and return all."""
    row = earlier(NAME).get(name, {}) | {"net": CASES[name].text, "b": list(numbers)}
    for key, value in found.items():
        row[key] = {**row.get(key, {}), **value} if isinstance(value, dict) else value
    return keep(NAME, {"T": inner_steps}, row, name, order=CASES)


def draw(results: dict[str, Any]) -> None:
    size = (11, 5.6)
    with plot(NAME, 2, len(results), size=size, squeeze=False, sharex=True) as (_, panels):
        for column, (name, found) in zip(panels.T, results.items(), strict=True):
            numbers = found["b"]
            for kind, (_, color) in KINDS.items():
                each = found[kind]
                unit = [value / found[PLAIN] for value in each["seconds"]]
                column[0].plot(numbers, unit, "o", ms=4, color=color, label=kind)
                column[0].plot(numbers, [each["none"] + b * each["a direction"] for b in numbers], color=color, lw=1.2)
                column[1].plot(numbers, each["MiB"], "o-", ms=4, color=color, lw=1.2)
            column[0].set(title=name, ylim=(0, None))
            column[1].set(xlabel="directions b", ylim=(0, None))
        panels[0][0].set_ylabel("CPU time, in inner runs")
        panels[1][0].set_ylabel("peak memory, MiB")
        panels[0][0].legend(fontsize=9)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--nets", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--directions", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--inner-steps", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="CPU seconds for the times of one net (%(default)s)")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    args = script.begin(parser, argv)
    results: dict[str, Any] = {}
    for name in args.nets if "MiB" in args.what else ():
        results = kept(name, args.directions, args.inner_steps, peaks(name, args.directions, args.inner_steps))
    for name in args.nets if "seconds" in args.what else ():
        found = times(name, args.directions, args.inner_steps, args.seconds)
        results = kept(name, args.directions, args.inner_steps, found)
    draw(results)
    return results


if __name__ == "__main__":
    main()
