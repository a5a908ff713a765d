"""Fully single loop: inner step, linear system and hypergradient advance by one step each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.autodiff import hessian_product, outer_gradients
from lightning_bilevel.calculus.inner_loop import last_loss
from lightning_bilevel.errors import MisconfigurationError, combination_error, number, one_of
from lightning_bilevel.host import Trainer
from lightning_bilevel.problem import Batch, BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.tree import Params

Schedule = Literal["constant", "inverse_sqrt"]


@dataclass
class _Tracked:
    """What the method carries from step to step.

    Attributes:
        k: outer steps taken.
        v: tracks H⁻¹ ∂f/∂θ.
        d: tracks ∇h.
        phi: φ of the previous step.
        theta: θ of the previous step, after its inner step.
    """

    k: int
    v: Params
    d: Params
    phi: Params
    theta: Params

    def trees(self) -> tuple[Params, ...]:
        """Return all but k."""
        return self.v, self.d, self.phi, self.theta


class FSLA(HypergradientStrategy):
    r"""One inner step, one step on the linear system, one variance-reduced step on the hypergradient.

    With outer parameters λ = φ, inner ω = θ, and samples ξ₁ … ξ₅::

        ω_k = ω_{k-1} − τ ∂_ω g(λ, ω_{k-1}; ξ₁)
        v_k = β ∂_ω f(λ, ω_{k-1}; ξ₂) + v_{k-1} − β ∂²_ω g(λ, ω_{k-1}; ξ₃) v_{k-1}
        ∇f_k(ξ) = ∂_λ f(λ, ω_k; ξ₄) − ∂_λ∂_ω g(λ, ω_k; ξ₅) v_k
        d_k = ∇f_k(ξ) + (1 − η) (d_{k-1} − ∇f_{k-1}(ξ))

    where ∇f_{k-1}(ξ) is evaluated at the previous (λ, ω, v) on the new sample. The estimate is d_k.

    Biased at every single step; tracks ∇h as ω, v and d converge. Memory: O(M + N), flat in everything.
    Cost: one inner step, one Hessian product, two mixed products: the cheapest step of all.

    ξ₁, ξ₃, ξ₅ are the first three inner batches of the episode (cycled), ξ₂ and ξ₄ its outer batch.
    Needs ``inner_start="warm"``, ``inner_steps=1``, plain gradient descent (or ``tau``), no shared
    parameters, no accumulation. v diverges unless β < 2/λ_max of the inner Hessian, and does so for an indefinite one.

    Source: FSLA, arXiv 2112.04660, Algorithm 1, eq. 8–10.

    Args:
        beta: β, the step on the linear system.
        eta: η in (0, 1], weight of the new sample; 1 turns the momentum off.
        tau: τ, the inner step; ``None`` takes the module's inner optimizer.
        schedule: ``"constant"``, or ``"inverse_sqrt"`` for τ, β, η times 1/√k.

    Raises:
        ValueError: a bad argument.

    >>> FSLA(beta=0.05, eta=0.5).schedule
    'constant'
    """

    exact = False
    unbiased = False
    requires = "step"
    second_order = True
    memory = "O(M + N)"
    cost = "1 step + 1 Hessian product + 2 mixed products"
    stacks = False

    def __init__(
        self, beta: float = 0.1, eta: float = 0.9, tau: float | None = None, schedule: Schedule = "constant"
    ) -> None:
        self.beta = number("FSLA(beta=...)", beta, above=0)
        self.eta = number("FSLA(eta=...)", eta, above=0, at_most=1)
        self.tau = None if tau is None else number("FSLA(tau=...)", tau, above=0)
        self.schedule = one_of("FSLA(schedule=...)", Schedule, schedule)
        self._tracked: _Tracked | None = None

    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Advance ω, v and d by one step and return d; see :meth:`HypergradientStrategy.estimate`."""
        last = self._on_device(phi)
        k = 1 if last is None else last.k + 1
        rate = 1.0 if self.schedule == "constant" else 1 / math.sqrt(k)
        first, third, fifth = (episode.inner[i % len(episode.inner)] for i in (0, 1, 2))
        before = problem.start(memory, phi)
        after, loss = self._inner_step(problem, before, phi, first, rate)
        metrics = last_loss(problem, [loss])
        v = self._linear_step(problem, before, phi, episode, third, last, rate * self.beta)
        value, d = self._tracking(problem, after, phi, episode, fifth, v)
        if last is not None:
            previous = replace(after, params=last.theta)
            _, correction = self._tracking(problem, previous, last.phi, episode, fifth, last.v)
            d = tree.add(d, tree.sub(last.d, correction), alpha=1 - rate * self.eta)
        # φ is stepped in place after this, and d is averaged over processes, so both are copied.
        self._tracked = _Tracked(k, v, tree.map(torch.clone, d), tree.map(torch.clone, phi), after.params)
        return Hypergradient(value, d, after, metrics)

    def refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what the single loop cannot work with in ``problem``."""
        found = []
        if problem.shared:  # then the rest does not matter
            shared = "`FSLA` with parameters shared by both levels"
            return [combination_error(shared, "θ has to go on from step to step", "Use `ReverseUnroll`")]
        if not problem.warm:
            found.append(("an inner level that starts anew", "θ has to go on", "`inner_start='warm'`"))
        if problem.inner_steps != 1:
            steps = f"`inner_steps={problem.inner_steps}`"
            found.append((steps, "it takes one inner step per outer step", "`inner_steps=1`"))
        if problem.update_uses_phi and self.tau is None:
            found.append(("an inner optimizer that depends on φ", "it cannot see how", "`FSLA(tau=...)`"))
        if problem.solver is None and self.tau is None and problem.stateful:
            found.append(
                ("an inner optimizer with state", "its step is plain descent", "`SGD(lr=...)` or `FSLA(tau=...)`")
            )
        return [combination_error(f"`FSLA` with {what}", because, f"Use {instead}") for what, because, instead in found]

    def check_trainer(self, trainer: Trainer) -> None:
        """Refuse accumulation: the previous triple must be one outer step old. Forget that of another fit.

        Lightning loads a checkpoint's state after this.
        """
        if trainer.accumulate_grad_batches != 1:
            raise combination_error(
                f"`FSLA` with `accumulate_grad_batches={trainer.accumulate_grad_batches}`",
                "each of its steps corrects the one before",
                "Use `accumulate_grad_batches=1` and larger batches",
            )
        self._tracked = None

    def carried(self) -> list[Tensor]:
        """Return v, d and the previous triple."""
        return [] if self._tracked is None else [value for each in self._tracked.trees() for value in each.values()]

    def state_dict(self) -> dict[str, Any]:
        """Return v, d, the previous triple and k."""
        return {"tracked": None if self._tracked is None else vars(self._tracked)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        tracked = state_dict["tracked"]
        self._tracked = None if tracked is None else _Tracked(**tracked)

    def _on_device(self, phi: Params) -> _Tracked | None:
        if self._tracked is None:
            return None
        device = next(iter(phi.values())).device
        v, d, last_phi, theta = (tree.to(x, device) for x in self._tracked.trees())
        return _Tracked(self._tracked.k, v, d, last_phi, theta)

    def _inner_step(
        self, problem: BilevelProblem, before: InnerState, phi: Params, batch: Batch, rate: float
    ) -> tuple[InnerState, Tensor]:
        if self.tau is not None:
            problem = replace(problem, update=self._descend)
        after, loss = problem.step(before, phi, batch)
        if rate != 1:
            move = tree.sub(after.params, before.params)
            after = replace(after, params=tree.add(before.params, move, alpha=rate))
        return after, loss

    def _descend(
        self, params: Params, grads: Params, slots: Any, phi: Params, step: int
    ) -> tuple[Params, dict[str, Params]]:
        assert self.tau is not None
        return tree.add(params, grads, alpha=-self.tau), slots

    def _linear_step(
        self,
        problem: BilevelProblem,
        before: InnerState,
        phi: Params,
        episode: Episode,
        batch: Batch,
        last: _Tracked | None,
        beta: float,
    ) -> Params:
        _, d, _ = outer_gradients(problem, before, phi, episode)
        if last is None:
            return tree.scale(d, beta)
        hessian, _ = hessian_product(problem, before, phi, batch)
        return tree.add(last.v, tree.sub(d, hessian(last.v)), alpha=beta)

    def _tracking(
        self, problem: BilevelProblem, state: InnerState, phi: Params, episode: Episode, batch: Batch, v: Params
    ) -> tuple[Tensor, Params]:
        """Return f and ∂_λ f − ∂_λ∂_ω g v."""
        value, _, c = outer_gradients(problem, state, phi, episode)
        _, mixed = hessian_product(problem, state, phi, batch)
        return value, tree.sub(c, mixed(v))
