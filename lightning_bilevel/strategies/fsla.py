"""Fully single loop: inner step, linear system and hypergradient advance by one step each."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.outer import OuterEvaluation, outer_value_and_grads
from lightning_bilevel.calculus.runs import last_loss
from lightning_bilevel.calculus.step import inner_step
from lightning_bilevel.errors import MisconfigurationError, combination_error, number, one_of
from lightning_bilevel.host import Trainer
from lightning_bilevel.problem import Batch, BilevelProblem, Carry, Episode, Hypergradient, InnerState, Update
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.stationarity import distance, gradient_of_stationary, warn_of_another_map
from lightning_bilevel.tree import Params

Schedule = Literal["constant", "inverse_sqrt"]


class FSLA(HypergradientStrategy):
    r"""One inner step, one step on the linear system, one variance-reduced step on the hypergradient.

    With outer parameters λ = φ, inner ω = θ, and samples ξ₁ … ξ₅::

        ω_k = ω_{k-1} − τ ∂_ω g(λ, ω_{k-1}; ξ₁)
        v_k = β ∂_ω f(λ, ω_{k-1}; ξ₂) + v_{k-1} − β ∂²_ω g(λ, ω_{k-1}; ξ₃) v_{k-1}
        ∇f_k(ξ) = ∂_λ f(λ, ω_k; ξ₄) − ∂_λ∂_ω g(λ, ω_k; ξ₅) v_k
        d_k = ∇f_k(ξ) + (1 − η) (d_{k-1} − ∇f_{k-1}(ξ))

    where ∇f_{k-1}(ξ) is evaluated at the previous (λ, ω, v) on the new sample. The estimate is d_k. g is the inner loss
    with the weight decay of the inner optimizer, and with the other sign where that ascends: what its steps make
    stationary (see :meth:`BilevelProblem.stationary`). A learned decay is differentiated through it.

    Biased at every single step; tracks ∇h as ω, v and d converge: ``inner_residual`` is logged, about the distance from
    ω_k to the minimum relative to ‖ω_k‖, ‖∂_ω g‖ ‖v_k‖ / (‖∂_ω f‖ ‖ω_k‖). Memory: O(M + N), flat in everything.
    Cost: one inner step, one Hessian product, two mixed products: the cheapest step of all.

    ξ₁, ξ₃, ξ₅ are the first three inner batches of the episode (cycled), ξ₂ and ξ₄ its outer batch.
    Needs ``inner_start="warm"``, ``inner_steps=1``, plain gradient descent (or ``tau``), no shared
    parameters, no accumulation. v diverges unless β < 2/λ_max of the inner Hessian, and does so for an indefinite one.

    Source: FSLA, arXiv 2112.04660, Algorithm 1, eq. 8–10.

    Args:
        beta: β, the step on the linear system.
        eta: η in (0, 1], weight of the new sample; 1 turns the momentum off.
        tau: τ, the rate of a plain inner step on g; ``None`` takes the step of the module's inner optimizer.
        schedule: ``"constant"``, or ``"inverse_sqrt"`` for τ, β, η times 1/√k.

    Raises:
        ValueError: a bad argument.

    >>> FSLA(beta=0.05, eta=0.5).schedule
    'constant'
    """

    exact = False
    unbiased = False
    differentiates = frozenset({"inner_gradient"})
    needs_steps = True
    memory = "O(M + N)"
    cost = "1 step + 1 Hessian product + 2 mixed products"
    supports_stacking = False

    def __init__(
        self, beta: float = 0.1, eta: float = 0.9, tau: float | None = None, schedule: Schedule = "constant"
    ) -> None:
        self.beta = number("FSLA(beta=...)", beta, above=0)
        self.eta = number("FSLA(eta=...)", eta, above=0, at_most=1)
        self.tau = None if tau is None else number("FSLA(tau=...)", tau, above=0)
        self.schedule = one_of("FSLA(schedule=...)", Schedule, schedule)

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Advance ω, v and d by one step and return d; see :meth:`HypergradientStrategy.estimate`.

        Carried: v, d, φ and ω of the last step, and k, the number of steps.
        """
        last = carry.strategy
        k = 1 + int(last["k"]["k"]) if last else 1
        rate = 1.0 if self.schedule == "constant" else 1 / math.sqrt(k)
        if self.tau is not None:
            problem = replace(problem, update=self._descent(problem))
        first, third, fifth = (episode.inner[i % len(episode.inner)] for i in (0, 1, 2))
        before = problem.start(carry.inner, phi)
        after, loss = self._inner_step(problem, before, phi, first, rate)
        metrics = last_loss(problem, [] if loss is None else [loss])
        v = self._linear_step(problem, before, phi, episode, third, last.get("v"), rate * self.beta)
        outer, residual, d = _tracking(problem, after, phi, episode, fifth, v)
        if last:
            previous = replace(after, params=last["theta"])
            _, _, correction = _tracking(problem, previous, last["phi"], episode, fifth, last["v"])
            d = tree.add(d, tree.sub(last["d"], correction), alpha=1 - rate * self.eta)
        metrics = {**metrics, "inner_residual": distance(residual, v, outer.d, after.params)}
        warn_of_another_map(problem, after, phi, residual, "FSLA")
        kept = {
            "k": {"k": torch.tensor(k)},
            "v": v,
            # φ is stepped in place after this, and what is kept is averaged over processes, so both are copied.
            "d": tree.map(torch.clone, d),
            "phi": tree.map(torch.clone, phi),
            "theta": tree.map(torch.clone, after.params),
        }
        return Hypergradient(outer.value, d, after, metrics, kept, outer.observed)

    def refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what the single loop cannot work with in ``problem``."""
        found = []
        if problem.shared:  # then the rest does not matter
            shared = "`FSLA` with parameters shared by both levels"
            return [combination_error(shared, "θ has to go on from step to step", "Use `ReverseUnroll`")]
        if not problem.traits.warm:
            found.append(("an inner level that starts anew", "θ has to go on", "`inner_start='warm'`"))
        if problem.inner_steps != 1:
            steps = f"`inner_steps={problem.inner_steps}`"
            found.append((steps, "it takes one inner step per outer step", "`inner_steps=1`"))
        if self.tau is None and problem.traits.learned():
            found.append(("an inner optimizer that depends on φ", "it cannot see how", "`FSLA(tau=...)`"))
        if problem.solver is None and self.tau is None and problem.traits.stateful():
            found.append(
                ("an inner optimizer with state", "its step is plain descent", "`SGD(lr=...)` or `FSLA(tau=...)`")
            )
        elif problem.solver is None and (name := problem.traits.unstationary()):
            because = "where it stays, the gradient of no function is zero: its weight decay, say, is not part of it"
            found.append((f"the inner optimizer `{name}`", because, "`SGD(lr=..., weight_decay=...)`"))
        return [combination_error(f"`FSLA` with {what}", because, f"Use {instead}") for what, because, instead in found]

    def trainer_refusals(self, trainer: Trainer) -> list[MisconfigurationError]:
        """Refuse accumulation: the previous triple must be one outer step old."""
        if trainer.accumulate_grad_batches == 1:
            return []
        return [
            combination_error(
                f"`FSLA` with `accumulate_grad_batches={trainer.accumulate_grad_batches}`",
                "each of its steps corrects the one before",
                "Use `accumulate_grad_batches=1` and larger batches",
            )
        ]

    def _inner_step(
        self, problem: BilevelProblem, before: InnerState, phi: Params, batch: Batch, rate: float
    ) -> tuple[InnerState, Tensor | None]:
        after, loss = inner_step(problem)(before, phi, batch)
        if rate != 1:
            move = tree.sub(after.params, before.params)
            after = replace(after, params=tree.add(before.params, move, alpha=rate))
        return after, loss

    def _descent(self, problem: BilevelProblem) -> Update:
        """Return the plain step at the rate τ on what ``problem`` makes stationary."""
        maximize, penalty, tau = problem.maximize, problem.penalty, self.tau
        assert tau is not None

        def update(
            params: Params, grads: Params, opt_state: dict[str, Params], phi: Params, step: int
        ) -> tuple[Params, dict[str, Params]]:
            slope = gradient_of_stationary(maximize, penalty, grads, params, phi)
            return tree.add(params, slope, alpha=-tau), opt_state

        return update

    def _linear_step(
        self,
        problem: BilevelProblem,
        before: InnerState,
        phi: Params,
        episode: Episode,
        batch: Batch,
        last: Params | None,
        beta: float,
    ) -> Params:
        d = outer_value_and_grads(problem, before, phi, episode).d
        if last is None:
            return tree.scale(d, beta)
        hessian, _ = inner_step(problem.stationary()).products(before, phi, batch)
        return tree.add(last, tree.sub(d, hessian(last)), alpha=beta)


def _tracking(
    problem: BilevelProblem, state: InnerState, phi: Params, episode: Episode, batch: Batch, v: Params
) -> tuple[OuterEvaluation, Params, Params]:
    """Return f with its gradients, ∂_ω g, and ∂_λ f − ∂_λ∂_ω g v."""
    outer = outer_value_and_grads(problem, state, phi, episode)
    condition = inner_step(problem.stationary()).stationarity(state, phi, batch)
    return outer, condition.residual, tree.sub(outer.c, condition.mixed(v))
