"""How much does a guide shrink the error of the forward gradient, and is it what theory says?

Real digits, half of the labels wrong, one weight per training example (N = 900), T inner steps, a few outer steps into
the run. The relative squared error ‖ĝ − ∇h‖² / ‖∇h‖² of `ForwardGradient` against `ReverseUnroll` is averaged over
repeated draws, for several numbers of directions b, plain and with three guides. Beside it stands the prediction:
(N − 1)/b plain, and (1 − cos²(∇h, guide)) (N − 1)/(b − 1) with a guide.

    python benchmarks/accuracy/guided_error.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_bilevel import ForwardGradient, GammaGreedy, ReverseUnroll, TruncatedReverse, hypergradient, tree

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.cleaning import started
from support.results import ORANGE, SKY, plot, save

import report
from data_cleaning import DataCleaning

GUIDES = {
    "no guide": None,
    "TruncatedReverse(1)": TruncatedReverse(1),
    "GammaGreedy(0.99)": GammaGreedy(0.99),
    "TruncatedReverse(20)": TruncatedReverse(20),
}
COLORS = dict(zip(GUIDES, (report.GREY, SKY, ORANGE, report.BLUE), strict=True))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--inner-steps", type=int, default=100)
    parser.add_argument("--outer-steps", type=int, default=5)
    parser.add_argument("--directions", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--draws", type=int, default=128, help="directions per point: draws / b estimates are averaged")
    parser.add_argument("--seed", type=int, default=0)
    args = script.begin(parser, argv)

    start = ReverseUnroll(checkpoint="sqrt")
    module, episode = started(DataCleaning, start, args.inner_steps, args.outer_steps, args.seed)
    exact = hypergradient(module, ReverseUnroll(checkpoint="sqrt"), episode).grads
    size, length = tree.numel(exact), tree.norm(exact)
    results: dict[str, Any] = {"N": size, "b": args.directions}
    print(f"{'guide':22s} {'b':>4s} {'measured':>10s} {'+-':>8s} {'predicted':>10s}")
    for name, guide in GUIDES.items():
        cosine = 0.0
        if guide is not None:
            guess = hypergradient(module, guide, episode).grads
            cosine = (tree.dot(guess, exact) / (tree.norm(guess) * length)).item()
        rows = []
        for b in args.directions:
            strategy = ForwardGradient(num_directions=b, guide=guide)
            repeats = max(2, args.draws // b)
            estimates = (hypergradient(module, strategy, episode, seed=seed).grads for seed in range(repeats))
            errors = torch.stack([(tree.norm(tree.sub(grads, exact)) / length) ** 2 for grads in estimates])
            predicted = (1 - cosine**2) * (size - 1) / (b - (guide is not None))
            standard_error = (errors.std() / repeats**0.5).item()
            rows.append({"measured": errors.mean().item(), "standard_error": standard_error, "predicted": predicted})
            print(f"{name:22s} {b:4d} {rows[-1]['measured']:10.2f} {standard_error:8.2f} {predicted:10.2f}", flush=True)
        results[name] = {"cosine": cosine, "factor": 1 - cosine**2, "errors": rows}
    save("guided_error", vars(args), results)

    with plot("guided_error", size=(6.4, 4.2)) as (_, axes):
        for name, color in COLORS.items():
            rows = results[name]["errors"]
            label = f"{name}, 1 − cos² = {results[name]['factor']:.2f}" if GUIDES[name] is not None else name
            bars = [row["standard_error"] for row in rows]
            axes.errorbar(args.directions, [row["measured"] for row in rows], bars, fmt="o", color=color, label=label)
            axes.plot(args.directions, [row["predicted"] for row in rows], color=color, lw=1.5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(xlabel="directions b", ylabel=r"$\|\hat g - \nabla h\|^2\ /\ \|\nabla h\|^2$")
        axes.set_title("Forward gradient with a guide: measured (dots), predicted (lines)")
        axes.set_xticks(args.directions, [str(b) for b in args.directions])
        axes.legend(fontsize=9)
    return results


if __name__ == "__main__":
    main()
