"""lightning_bilevel as a solver of benchopt's bilevel benchmark, to which `benchmark_utils/` goes as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from benchmark_utils.in_torch import UnknownProblemError, in_torch, tensor
from benchmark_utils.second_order import Evaluate, newton, quasi_newton
from benchopt import BaseSolver
from benchopt.stopping_criterion import SufficientProgressCriterion
from torch import Tensor

from lightning_bilevel import (
    SOBA,
    Carry,
    Episode,
    HypergradientStrategy,
    ImplicitGradient,
    PenaltyGradient,
    ReverseUnroll,
    hypergradient,
)
from lightning_bilevel.linear_solvers import ConjugateGradient, Neumann
from lightning_bilevel.problem import BilevelProblem, InnerState, Traits
from lightning_bilevel.tree import Params

Z, X = "inner_var", "outer_var"
QUASI_NEWTON = "quasi-Newton"


class Solver(BaseSolver):
    """Hypergradients of lightning_bilevel, and an outer optimizer.

    ``strategy`` is one of

    - ``"implicit"``: the inner problem is solved by Newton's method, and the implicit function theorem applied there;
    - ``"reverse"``: through ``n_inner_steps`` steps;
    - ``"penalty"``: these steps on the inner loss, and on it and the outer loss / ``penalty``;
    - ``"amigo"``: these steps, and as many on the linear system, which goes on from the last solution;
    - ``"soba"``: one step of all three (SRBA), with a full batch at every ``period``-th.

    ``outer`` is ``"quasi-Newton"`` or an optimizer of PyTorch, at ``outer_rate``: the longest step, or the rate.
    ``tolerance`` is of the inner gradient's norm, ``linear_tolerance`` relative.
    """

    name = "lightning_bilevel"
    requirements = ["pip::torch", "pip::pytorch-lightning"]
    stopping_criterion = SufficientProgressCriterion(patience=12_800, strategy="callback")
    parameters = {
        "strategy": ["implicit"],
        "outer": [QUASI_NEWTON],
        "outer_rate": [1.0],
        "batch_size": ["full"],
        "step_size": [0.1],
        "n_inner_steps": [10],
        "period": [100],
        "penalty": [100.0],
        "tolerance": [1e-5],
        "linear_tolerance": [1e-3],
        "precision": ["float64"],
        "eval_freq": [1],
        "random_state": [1],
    }

    @staticmethod
    def get_next(stop_val: int) -> int:
        return stop_val + 1

    def skip(self, **objective: Any) -> tuple[bool, str | None]:
        """Say so where a problem is not known."""
        try:
            self.set_objective(**objective)
        except UnknownProblemError as error:
            return True, str(error)
        return False, None

    def set_objective(
        self, f_inner: Any, f_outer: Any, n_inner_samples: int, n_outer_samples: int, inner_var0: Any, outer_var0: Any
    ) -> None:
        """Read the problem."""
        dtype = getattr(torch, self.precision)
        self.z0, self.x0 = tensor(inner_var0, dtype), tensor(outer_var0, dtype)
        self.losses = in_torch(f_inner, f_outer, (n_inner_samples, n_outer_samples), self.z0, self.x0)

    def warm_up(self) -> None:
        """Leave out what PyTorch does once."""
        self.run_once(2)

    def run(self, callback: Callable[[], bool]) -> None:
        """Take outer steps, ``eval_freq`` of them between two calls of ``callback``."""
        self.z, self.x = self.z0, self.x0
        problem, strategy, episodes = self.problem(), self.estimator(), self.episodes()
        carry = Carry(InnerState({Z: self.z}))

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal carry
            found = hypergradient(problem, strategy, next(episodes), carry=carry, phi={X: x})
            carry, self.z = found.carry, found.state.params[Z]
            return found.value, found.grads[X]

        steps = self.steps(evaluate)
        while callback():
            for _ in range(self.eval_freq):
                self.x = next(steps)

    def get_result(self) -> dict[str, Any]:
        """Return both variables as the benchmark has them."""
        return {Z: self.z.numpy().astype("float32"), X: self.x.numpy().astype("float32")}

    def problem(self) -> BilevelProblem:
        """Return the problem as the strategies take it."""
        inner, outer = self.losses.inner, self.losses.outer

        def solve(theta: Params, phi: Params, batches: Sequence[Any], buffers: Params) -> Params:
            return {Z: newton(inner, theta[Z], phi[X], *batches, tolerance=self.tolerance)}

        return BilevelProblem(
            inner_loss=lambda theta, phi, samples, buffers: (inner(theta[Z], phi[X], samples), buffers),
            outer_loss=lambda theta, phi, samples, buffers: outer(theta[Z], phi[X], samples),
            update=lambda theta, grads, state, phi, step: ({Z: theta[Z] - self.step_size * grads[Z]}, state),
            inner_steps=1 if self.strategy == "soba" else self.n_inner_steps,
            solver=solve if self.strategy == "implicit" else None,
            traits=Traits(warm=True),
        )

    def estimator(self) -> HypergradientStrategy:
        """Return the strategy."""
        if self.strategy == "implicit":
            return ImplicitGradient(ConjugateGradient(max_iter=100, tol=self.linear_tolerance), warm_start=True)
        if self.strategy == "reverse":
            return ReverseUnroll()
        if self.strategy == "penalty":
            return PenaltyGradient(self.penalty)
        if self.strategy == "amigo":
            series = Neumann(self.n_inner_steps, step_size=self.step_size)
            return ImplicitGradient(series, warm_start=True, batches="fresh")
        return SOBA(self.step_size, self.step_size, momentum="recursive", period=self.period)

    def steps(self, evaluate: Evaluate) -> Iterator[Tensor]:
        """Yield x after each outer step."""
        if self.outer == QUASI_NEWTON:
            yield from quasi_newton(evaluate, self.x0, self.outer_rate)
        x = self.x0.clone().requires_grad_()
        optimizer = getattr(torch.optim, self.outer)([x], self.outer_rate)
        while True:
            _, x.grad = evaluate(x.detach())
            optimizer.step()
            yield x.detach()

    def episodes(self) -> Iterator[Episode]:
        """Yield the batches of each estimate, as slices: all of them once before one comes again."""
        everything = [slice(0, total) for total in self.losses.samples]
        inner, outer = (
            batches(total, self.batch_size, self.random_state + seed) for seed, total in enumerate(self.losses.samples)
        )
        needed = {"amigo": 2 * self.n_inner_steps + 1, "soba": 1}.get(self.strategy, self.n_inner_steps)
        for step in count():
            if self.batch_size == "full" or (self.strategy == "soba" and step % self.period == 0):
                yield Episode([everything[0]], everything[1])
            else:
                yield Episode([next(inner) for _ in range(needed)], next(outer))


def batches(total: int, size: Any, seed: int) -> Iterator[slice]:
    """Yield slices of ``size`` out of ``total``, in another order in each epoch."""
    generator = np.random.RandomState(seed)
    starts = range(0, total, total if size == "full" else size)
    while True:
        for start in generator.permutation(starts):
            yield slice(int(start), min(int(start) + starts.step, total))
