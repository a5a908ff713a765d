"""Do the memory knobs follow their formulas? Peak memory against `checkpoint`, `chunk_size` and `episode_chunk_size`.

A net 784-256-10 under gradient descent (M = 203,530 inner parameters), example weights as outer parameters (N = 1,000),
T inner steps on random data. Every estimate runs in a process of its own, forked for it; its peak is the highest
resident memory less that at the start, when a smaller estimate has loaded the code. Beside it stands the formula of
docs/precision.md, whose one unknown, the activations of a step (or of a perturbed run), is measured by a further run.

    python benchmarks/cost/memory_knobs.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_bilevel import PZOBO, ForwardGradient, HypergradientStrategy, ReverseUnroll, hypergradient

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.measure import peak
from support.problems import episodes, module, perceptron_net
from support.results import save

NET = perceptron_net(784, 256, 10, examples=1000)
MIB = 2**20


def of(strategy: HypergradientStrategy, steps: int, count: int = 1, chunk: int | None = None) -> float:
    full, small = (module(NET, each, episode_chunk_size=chunk) for each in (steps, 1))
    some = episodes(NET, count)
    return peak(
        lambda: hypergradient(full, strategy, some if count > 1 else some[0]),
        lambda: hypergradient(small, strategy, some[:2]),  # what is loaded at first use is no part of a peak
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--steps", type=int, default=64, help="T (%(default)s)")
    args = script.begin(parser, argv)
    total = args.steps
    state = sum(p.numel() for p in NET.make().parameters()) * 4 / MIB
    direction = 4 * state + NET.examples * 4 / MIB
    base = of(ReverseUnroll(), 1)
    graph = (of(ReverseUnroll(), 2 * total) - of(ReverseUnroll(), total)) / total
    results: dict[str, Any] = {"state": state, "graph of a step": graph, "one step": base}

    results["checkpoint"] = [
        {"k": k, "measured": of(ReverseUnroll(checkpoint=k), total), "formula": base + total / k * state + k * graph}
        for k in (1, 2, 4, 8, 16, 32)
    ]
    results["checkpoint"].append({"k": total, "measured": of(ReverseUnroll(), total), "formula": base + total * graph})

    def rows(sizes: Sequence[int], measure: Callable[[int], float], slope: float) -> list[dict[str, float]]:
        found = [measure(size) for size in sizes]
        pairs = zip(sizes, found, strict=True)
        return [{"k": k, "measured": each, "formula": found[0] + (k - sizes[0]) * slope} for k, each in pairs]

    sizes = (1, 8, 16, 32)
    results["directions"] = rows(sizes, lambda k: of(ForwardGradient(32, chunk_size=k), 4), direction)
    one_run = (of(PZOBO(64, chunk_size=32), 4) - of(PZOBO(64, chunk_size=8), 4)) / 24
    results["a perturbed run"] = one_run
    results["runs"] = rows((2, 4, 8, 16), lambda k: of(PZOBO(32, chunk_size=k), 4), one_run)
    one_episode = (of(ReverseUnroll(), 4, 12, 12) - of(ReverseUnroll(), 4, 12, 6)) / 6
    results["an episode"] = one_episode
    results["episodes"] = rows((2, 4, 8), lambda k: of(ReverseUnroll(), 4, 8, k), one_episode)
    for name, found in results.items():
        print(name, found if isinstance(found, float) else "")
        for row in found if isinstance(found, list) else ():
            print(f"  {row['k']:4d} {row['measured']:8.1f} MiB measured {row['formula']:8.1f} MiB by the formula")
    save("memory_knobs", vars(args), results)
    return results


if __name__ == "__main__":
    main()
