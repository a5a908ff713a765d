"""Do `chunk_size=None` and `episode_chunk_size=None` choose well? Times with them and with fixed sizes.

Directions of `ForwardGradient` and of `PZOBO`, and episodes of `ReverseUnroll`, 16 of each, on five nets with a few
inner steps. CPU seconds of one thread: all sizes take turns, and the least of each counts. The library's own choice is
compared with the best fixed size of the same run. (`ZerothOrder` chooses as `PZOBO` does.) What has been measured for
other nets before is kept.

    python benchmarks/cost/chunk_choice.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_bilevel import PZOBO, ForwardGradient, ReverseUnroll, hypergradient

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.measure import least_seconds
from support.problems import NETS, Net, episodes, module, perceptron_net
from support.results import keep, plot

import report

NAME = "chunk_choice"
CASES = {
    "small MLP": NETS["small MLP"],
    "MLP": NETS["MLP"],
    "wide MLP": perceptron_net(784, 1024, 10, examples=50),
    "CNN": NETS["CNN"],
    "GPT-2": NETS["GPT-2"],
}
SIZES = (1, 2, 4, 8, 16)
OWN = "None"
COLORS = {"ForwardGradient": report.BLUE, "PZOBO": report.VERMILION, "episodes": report.GREEN}


def directions(net: Net, kind: Callable[..., Any], inner_steps: int, size: int | None) -> Callable[[], Any]:
    problem, episode = module(net, inner_steps), episodes(net, 1)[0]
    return lambda: hypergradient(problem, kind(max(SIZES), chunk_size=size), episode)


def several(net: Net, inner_steps: int, size: int | None) -> Callable[[], Any]:
    problem, some = module(net, inner_steps, episode_chunk_size=size), episodes(net, max(SIZES))
    return lambda: hypergradient(problem, ReverseUnroll(), some)


KINDS: dict[str, Callable[[Net, int, int | None], Callable[[], Any]]] = {
    "ForwardGradient": lambda net, steps, size: directions(net, ForwardGradient, steps, size),
    "PZOBO": lambda net, steps, size: directions(net, PZOBO, steps, size),
    "episodes": several,
}


def draw(results: dict[str, dict[str, Any]]) -> None:
    size = (2.8 * len(results), 3.3)
    with plot(NAME, 1, len(results), size=size, sharey=True, squeeze=False) as (_, panels):
        for axes, (name, net) in zip(panels[0], results.items(), strict=True):
            for kind in KINDS:
                found = net[kind]
                label = kind if kind != "episodes" else "ReverseUnroll over episodes"
                fixed = [found["seconds"][str(size)] / found["best"] for size in SIZES]
                axes.plot(SIZES, fixed, "o-", ms=4, color=COLORS[kind], label=label)
                axes.axhline(found["seconds"][OWN] / found["best"], color=COLORS[kind], lw=1.2, ls=(0, (2, 2)))
            axes.set(xlabel="chunk size", title=name, ylim=(0.9, 6))
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_yticks([1, 2, 4], ["1", "2", "4"])
            axes.set_xticks(SIZES, [str(size) for size in SIZES])
        panels[0][0].set_ylabel("time, of the best fixed size")
        panels[0][-1].plot([], [], color=report.GREY, lw=1.2, ls=(0, (2, 2)), label="what None takes")
        panels[0][-1].legend(fontsize=9)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--inner-steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=1, help="CPU seconds of the turns, or more (%(default)s)")
    parser.add_argument("--nets", nargs="+", choices=CASES, default=list(CASES))
    args = script.begin(parser, argv)
    results: dict[str, dict[str, Any]] = {}
    for name in args.nets:
        found: dict[str, Any] = {"net": CASES[name].text}
        for kind, make in KINDS.items():
            sizes = {OWN: None, **{str(size): size for size in SIZES}}
            seconds = least_seconds(
                {text: make(CASES[name], args.inner_steps, size) for text, size in sizes.items()},
                args.repeats,
                args.seconds,
            )
            best = min(value for text, value in seconds.items() if text != OWN)
            found[kind] = {"seconds": seconds, "best": best, "own over best": seconds[OWN] / best}
            times = "  ".join(f"{text}: {1000 * value:.1f}" for text, value in seconds.items())
            print(f"{name:10s} {kind:16s} ms {times}  None over best: {seconds[OWN] / best:.2f}", flush=True)
        settings = {"T": args.inner_steps, "count": max(SIZES), "sizes": SIZES}
        results = keep(NAME, settings, found, name, order=CASES)
    draw(results)
    return results


if __name__ == "__main__":
    main()
