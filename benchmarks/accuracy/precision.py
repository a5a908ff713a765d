"""How exact are hypergradients in each precision of Lightning's Trainer, and which μ do finite differences need?

The data cleaning of `examples/data_cleaning.py`: real digits, half of the labels wrong, one weight per training example
(N = 900), T inner steps, a few outer steps into the run; with tanh for ReLU, on whose kinks finite differences have
errors of their own. Every estimate is compared with the same estimate in float64 (same directions):
‖ĝ − ĝ_64‖ / ‖ĝ_64‖, the mean over seeds. Three questions, three parts of the results:

- each strategy in each precision;
- `ZerothOrder` and `PZOBO` over μ against the exact derivatives along the same directions, with what they warn of;
- losses multiplied by a small constant (and the inner learning rate divided by it, which makes the run the same): what
  becomes of gradients that nothing scales.

"16-mixed" and "bf16-mixed" are `torch.autocast`, as Lightning uses it; "16-true" and "bf16-true" have parameters and
data in that dtype.

    python benchmarks/accuracy/precision.py
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_bilevel import (
    FSLA,
    PZOBO,
    SGD,
    Episode,
    ForwardGradient,
    GammaGreedy,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
    hypergradient,
    tree,
)
from lightning_bilevel.directions import Rademacher
from lightning_bilevel.linear_solvers import ConjugateGradient, Neumann

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.cleaning import started
from support.results import ORANGE, plot, save

import report
from data_cleaning import DataCleaning

STRATEGIES: dict[str, Callable[[], HypergradientStrategy]] = {
    "ReverseUnroll": ReverseUnroll,
    "TruncatedReverse(5)": lambda: TruncatedReverse(5),
    "ForwardGradient(16)": lambda: ForwardGradient(16),
    'ForwardGradient(16, mode="forward")': lambda: ForwardGradient(16, mode="forward"),
    "ForwardGradient(16, guide=TruncatedReverse(5))": lambda: ForwardGradient(16, guide=TruncatedReverse(5)),
    "GammaGreedy": GammaGreedy,
    "ImplicitGradient(Neumann(20))": lambda: ImplicitGradient(Neumann(20, step_size=0.5)),
    "ImplicitGradient(ConjugateGradient(10))": lambda: ImplicitGradient(ConjugateGradient(10, tol=0.01, damping=0.1)),
    "FSLA": FSLA,
    "PZOBO(16, mu=0.1)": lambda: PZOBO(16, mu=0.1, directions=Rademacher()),
    "ZerothOrder(16, mu=0.1)": lambda: ZerothOrder(16, mu=0.1, directions=Rademacher()),
}
PRECISIONS = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}
DIFFERENCES = {"ZerothOrder": ZerothOrder, "PZOBO": PZOBO}
DIFFERED = {"32-true": report.BLUE, "16-mixed": ORANGE, "bf16-mixed": report.VERMILION}
MUS = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0]
SCALES = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]

Problems = Sequence[tuple["Scaled", Episode]]


class Scaled(DataCleaning):
    """The same problem and the same run, with both losses multiplied by a constant."""

    factor = 1.0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net[2] = nn.Tanh()

    def inner_loss(self, batch: Any) -> Any:
        return self.factor * super().inner_loss(batch)

    def outer_loss(self, batch: Any) -> Any:
        return self.factor * super().outer_loss(batch)

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=self.hparams.inner_lr / self.factor)


def estimate(
    module: Scaled, episode: Episode, strategy: HypergradientStrategy, precision: str, seed: int
) -> tree.Params:
    """Return an estimate in a precision, as float64."""
    module = copy.deepcopy(module)
    module.inner_steps = 1 if isinstance(strategy, FSLA) else module.inner_steps
    dtype = torch.float64 if precision == "64-true" else PRECISIONS[precision]
    stored = torch.float32 if precision.endswith("mixed") else dtype
    module.to(stored)
    episode = tree_map(lambda x: x.to(stored) if x.is_floating_point() else x, episode)
    with torch.autocast("cpu", dtype, enabled=precision.endswith("mixed")):
        return tree.map(torch.Tensor.double, hypergradient(module, strategy, episode, seed=seed).grads)


def each_strategy(problems: Problems) -> dict[str, dict[str, Any]]:
    """Return the errors of every strategy in every precision; of one that failed, the reason."""
    table: dict[str, dict[str, Any]] = {}
    for name, make in STRATEGIES.items():
        exact = [estimate(*problem, make(), "64-true", seed) for seed, problem in enumerate(problems)]
        table[name] = {precision: mean_error(problems, make, precision, exact)[0] for precision in PRECISIONS}
        print(f"{name:48s}", *(f"{value:<10.2g}" for value in table[name].values()), flush=True)
    return table


def over_mu(problems: Problems) -> dict[str, dict[str, Any]]:
    """Return the errors of finite differences against derivatives along the same directions, and which warned."""
    derivative = ForwardGradient(16, Rademacher())
    exact = [estimate(*problem, derivative, "64-true", seed) for seed, problem in enumerate(problems)]
    table: dict[str, dict[str, Any]] = {}
    for name, kind in DIFFERENCES.items():
        table[name] = {precision: [] for precision in DIFFERED}
        for precision, rows in table[name].items():
            for mu in MUS:
                make = partial(kind, 16, mu=mu, directions=Rademacher())
                found, warned = mean_error(problems, make, precision, exact)
                rows.append({"mu": mu, "error": found, "warned": warned})
            print(f"{name:12s} {precision:10s}", *(f"{row['error']:<8.2g}" for row in rows), flush=True)
    return table


def over_scale(problems: Problems) -> dict[str, list[float]]:
    """Return the errors of `ReverseUnroll` with losses that are multiplied by a constant."""
    table: dict[str, list[float]] = {"16-mixed": [], "bf16-mixed": []}
    for factor in SCALES:
        for module, _ in problems:
            module.factor = factor
        exact = [estimate(*problem, ReverseUnroll(), "64-true", seed) for seed, problem in enumerate(problems)]
        for precision, errors in table.items():
            errors.append(mean_error(problems, ReverseUnroll, precision, exact)[0])
    for precision, errors in table.items():
        print(f"{precision:10s}", *(f"{value:<8.2g}" for value in errors), flush=True)
    return table


def mean_error(
    problems: Problems, make: Callable[[], HypergradientStrategy], precision: str, exact: Sequence[tree.Params]
) -> tuple[float, float]:
    """Return the mean relative error over problems, and the share of them in which the strategy warned of its μ."""
    errors, warned = [], 0
    for seed, (problem, expected) in enumerate(zip(problems, exact, strict=True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = estimate(*problem, make(), precision, seed)
        errors.append((tree.norm(tree.sub(found, expected)) / tree.norm(expected)).item())
        warned += any("is small for" in str(each.message) for each in caught)
    return sum(errors) / len(errors), warned / len(problems)


def draw(table: dict[str, dict[str, Any]]) -> None:
    """Draw the errors over μ: filled where nothing was said, hollow where a warning came."""
    with plot("precision", 1, 2, size=(9.2, 4.2), sharey=True) as (_, both):
        for axes, (name, precisions) in zip(both, table.items(), strict=True):
            for precision, color in DIFFERED.items():
                rows = precisions[precision]
                errors = [row["error"] for row in rows]
                axes.plot([row["mu"] for row in rows], errors, color=color, lw=1.5, label=precision)
                for row in rows:
                    axes.plot(row["mu"], row["error"], "o", ms=6, mec=color, mfc="white" if row["warned"] else color)
            axes.set(xscale="log", yscale="log", xlabel="μ", title=name)
        both[0].set_ylabel("relative error against exact derivatives\nalong the same 16 directions")
        both[0].set_ylim(1e-3, 1e3)
        both[1].plot([], [], "o", mec=report.GREY, mfc="white", label="the strategy warns of its μ")
        both[1].legend(fontsize=9)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--inner-steps", type=int, default=10)
    parser.add_argument("--outer-steps", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    args = script.begin(parser, argv)
    warnings.filterwarnings("ignore", message="(`isinstance|`ConjugateGradient|`Neumann)")

    steps = args.inner_steps, args.outer_steps
    problems = [started(Scaled, ReverseUnroll(), *steps, seed) for seed in range(args.seeds)]
    results = {"strategies": each_strategy(problems), "mu": over_mu(problems), "scale": over_scale(problems)}
    save("precision", {**vars(args), "N": 900, "scales": SCALES}, results)
    draw(results["mu"])
    return results


if __name__ == "__main__":
    main()
