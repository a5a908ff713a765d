"""How fast do the estimates of one hypergradient converge with the number of inner steps K?

The synthetic quadratic of FSLA (arXiv 2112.04660, section "Synthetic dataset", Figure 1, left): λ is held fixed,
ω runs K gradient steps from 0, and the error ‖∇f_K − ∇f‖² of FSLA, Neumann (K terms), conjugate gradients
(K iterations) and reverse unrolling is measured against the closed form. FSLA spends one Hessian
product per step, the others K for every estimate.

    python benchmarks/papers/fsla_figure1.py
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bilevel import FSLA, SGD, BilevelModule, Episode, ImplicitGradient, ReverseUnroll, hypergradient
from lightning_bilevel.linear_solvers import ConjugateGradient, Neumann

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.fits import fit
from support.results import SKY, plot, save

import report


class SyntheticQuadratic(BilevelModule):
    """min_λ ‖A_o ω_λ − b_o‖² with ω_λ = argmin_ω ‖A_λ λ + A_ω ω − b_i‖², as the paper draws it."""

    def __init__(self, rows: int, dimension: int, learning_rate: float, inner_steps: int = 1, seed: int = 0) -> None:
        super().__init__(inner_steps=inner_steps)
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        def noise() -> Tensor:
            return 0.1**0.5 * torch.randn(rows, generator=generator, dtype=torch.float64)

        a_outer, a_lambda, a_omega = (uniform(rows, dimension) for _ in range(3))
        true_lambda, true_omega, start = (uniform(dimension) for _ in range(3))
        self.learning_rate = learning_rate
        self.a_outer, self.a_lambda, self.a_omega = a_outer, a_lambda, a_omega
        self.b_outer = a_outer @ true_omega + noise()
        self.b_inner = a_lambda @ true_lambda + a_omega @ uniform(dimension) + noise()
        self.lam = nn.Parameter(start)
        self.omega = nn.Parameter(torch.zeros(dimension, dtype=torch.float64))

    def inner_parameters(self) -> list[nn.Parameter]:
        return [self.omega]

    def inner_loss(self, batch: Any) -> Tensor:
        return (self.a_lambda @ self.lam + self.a_omega @ self.omega - self.b_inner).square().sum()

    def outer_loss(self, batch: Any) -> Tensor:
        return (self.a_outer @ self.omega - self.b_outer).square().sum()

    def configure_inner_optimizer(self) -> SGD:
        return SGD(lr=self.learning_rate)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.lam], lr=0.0)  # λ stays where it is; only the estimate is watched

    def exact(self) -> Tensor:
        """Return ∇f(λ) in closed form: ω_λ solves A_ωᵀ A_ω ω = A_ωᵀ (b_i − A_λ λ)."""
        gram = self.a_omega.T @ self.a_omega
        omega = torch.linalg.solve(gram, self.a_omega.T @ (self.b_inner - self.a_lambda @ self.lam.detach()))
        d = 2 * self.a_outer.T @ (self.a_outer @ omega - self.b_outer)
        return -self.a_lambda.T @ self.a_omega @ torch.linalg.solve(gram, d)


class Recorder(pl.Callback):
    """Keeps the hypergradient that every training step hands to the outer optimizer."""

    def __init__(self) -> None:
        self.grads: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.grads.append(pl_module.lam.grad.clone())


def fsla_errors(steps: int, beta: float, **problem: Any) -> list[float]:
    """Return FSLA's relative squared error after each of ``steps`` training steps."""
    module, recorder = SyntheticQuadratic(**problem), Recorder()
    episodes = DataLoader([Episode([torch.zeros(1)], torch.zeros(1))] * steps, batch_size=None)
    fit(module, episodes, FSLA(beta=beta, eta=1.0), recorder, max_steps=steps)
    exact = module.exact()
    return [((grad - exact).norm() / exact.norm()).square().item() for grad in recorder.grads]


def estimate_error(strategy: Any, inner_steps: int, **problem: Any) -> float:
    """Return the relative squared error of one estimate after ``inner_steps`` steps from 0."""
    module = SyntheticQuadratic(**problem, inner_steps=inner_steps)
    estimate = hypergradient(module, strategy, Episode([torch.zeros(1)], torch.zeros(1)))
    exact = module.exact()
    return ((estimate.grads["lam"] - exact).norm() / exact.norm()).square().item()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--dimension", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="of the inner steps and of the linear system")
    parser.add_argument("--steps", type=int, default=400)
    args = script.begin(parser, argv)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*ConjugateGradient.* reached a relative residual")

    problem = {"rows": args.rows, "dimension": args.dimension, "learning_rate": args.learning_rate}
    counts = sorted({round(args.steps ** (i / 24)) for i in range(25)})
    results = {"K": counts, "FSLA": [fsla_errors(args.steps, args.learning_rate, **problem)[k - 1] for k in counts]}
    makers = {
        "Neumann": lambda k: ImplicitGradient(Neumann(terms=k, step_size=args.learning_rate)),
        "CG": lambda k: ImplicitGradient(ConjugateGradient(max_iter=k, tol=1e-14)),
        "reverse": lambda k: ReverseUnroll(),
    }
    for name, make in makers.items():
        results[name] = [estimate_error(make(k), k, **problem) for k in counts]
    save("fsla_figure1", vars(args), results)

    styles = {
        "FSLA": (report.VERMILION, "-"),
        "Neumann": (report.BLUE, "-"),
        "reverse": (SKY, "--"),
        "CG": (report.GREEN, "-"),
    }
    with plot("fsla_figure1", size=(6.4, 4.2)) as (_, axes):
        for name, (color, line) in styles.items():
            axes.loglog(counts, results[name], line, color=color, label=name)
        axes.set(
            xlabel="inner steps K",
            ylabel=r"$\|\nabla f_K - \nabla f\|^2\ /\ \|\nabla f\|^2$",
            title="One hypergradient, four estimators",
        )
        axes.legend()
    print(f"{'K':>5} " + " ".join(f"{name:>10}" for name in styles))
    for row, k in enumerate(counts):
        print(f"{k:5d} " + " ".join(f"{results[name][row]:10.2e}" for name in styles))
    return results


if __name__ == "__main__":
    main()
