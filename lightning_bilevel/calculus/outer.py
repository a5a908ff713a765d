"""The outer loss at the end of an inner run: the one place that evaluates f for an estimate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.surrogate import surrogate_loss
from lightning_bilevel.problem import TOTAL, BilevelProblem, Episode, InnerState, Slopes
from lightning_bilevel.tree import Params


class OuterEvaluation(NamedTuple):
    """The outer loss at a state, detached.

    Attributes:
        value: f(θ, φ).
        d: ∂f/∂θ.
        c: ∂f/∂φ.
        observed: what the evaluation left behind, see :class:`~lightning_bilevel.problem.Observer`.

    >>> OuterEvaluation(torch.tensor(1.0), {"w": torch.ones(1)}, {"p": torch.zeros(1)}, None).c
    {'p': tensor([0.])}
    """

    value: Tensor
    d: Params
    c: Params
    observed: Any


def outer_value_and_grads(problem: BilevelProblem, state: InnerState, phi: Params, episode: Episode) -> OuterEvaluation:
    """Return f, d = ∂f/∂θ and c = ∂f/∂φ at ``state``.

    Where the outer loss is weighed at every step, h is the total that the run has ended with, already evaluated:
    d is 1 for it.

    On f = ½‖Cθ − y‖² + ½ρ‖φ‖²:

    >>> from lightning_bilevel.testing import Quadratic
    >>> module = Quadratic()
    >>> (problem, phi, carry), episode = module.plain(), module.episode()
    >>> value, d, c, _ = outer_value_and_grads(problem, carry.inner, phi, episode)
    >>> torch.allclose(c["target"], module.rho * phi["target"])
    True
    """
    if problem.outer_loss_weights is not None:
        total = _total(state)
        return OuterEvaluation(total, {TOTAL: torch.ones_like(total)}, tree.zeros_like(phi), _observed(problem))
    slopes = None
    if problem.compiler is not None:
        slopes = problem.compiler.losses.outer_slopes(problem, state, phi, episode.outer)
    if slopes is None:
        slopes = _outer_slopes(problem, state, phi, episode)
    return OuterEvaluation(*slopes, observed=_observed(problem))


def _outer_slopes(problem: BilevelProblem, state: InnerState, phi: Params, episode: Episode) -> Slopes:
    theta, outer = tree.leaves(state.params), tree.leaves(phi)
    with torch.enable_grad():
        value = problem.outer_loss(theta, outer, episode.outer, state.buffers)
    return value.detach(), *gradients(value, theta, outer)


def outer_graph(problem: BilevelProblem, state: InnerState, phi: Params, episode: Episode) -> tuple[Tensor, Any]:
    """Return f, which hangs on the graphs of ``state`` and ``phi``, and what the evaluation left behind.

    >>> from lightning_bilevel.testing import Quadratic
    >>> module = Quadratic()
    >>> (problem, phi, carry), episode = module.plain(), module.episode()
    >>> outer = tree.leaves(phi)
    >>> value, _ = outer_graph(problem, carry.inner, outer, episode)
    >>> torch.allclose(tree.grad(value, outer)["target"], module.rho * phi["target"])
    True
    """
    if problem.outer_loss_weights is not None:
        return _total(state), _observed(problem)
    if problem.compiler is not None:
        slopes = problem.compiler.losses.outer_slopes(problem, state.detach(), tree.detach(phi), episode.outer)
        if slopes is not None:
            return _with_slopes(slopes, state.params, phi), _observed(problem)
    with torch.enable_grad():
        value = problem.outer_loss(state.params, phi, episode.outer, state.buffers)
    return value, _observed(problem)


def outer_value(problem: BilevelProblem, state: InnerState, phi: Params, episode: Episode) -> tuple[Tensor, Any]:
    """Return f at ``state`` and what the evaluation left behind; the loss itself may take gradients.

    >>> from lightning_bilevel.testing import Quadratic
    >>> module = Quadratic()
    >>> (problem, phi, carry), episode = module.plain(), module.episode()
    >>> value, observed = outer_value(problem, carry.inner, phi, episode)
    >>> value.requires_grad, observed
    (False, None)
    """
    if problem.outer_loss_weights is not None:
        return _total(state).detach(), _observed(problem)
    value = None
    if problem.compiler is not None:
        value = problem.compiler.losses.outer_value(problem, state, phi, episode.outer)
    if value is None:
        with torch.enable_grad():
            value = problem.outer_loss(tree.leaves(state.params), tree.leaves(phi), episode.outer, state.buffers)
    return value.detach(), _observed(problem)


def outer_weights(problem: BilevelProblem, phi: Params) -> Tensor:
    """Return w, ``(T,)``, with a graph to ``phi`` where it depends on them, see :data:`OuterWeights`."""
    assert problem.outer_loss_weights is not None
    with torch.enable_grad():
        return problem.outer_loss_weights(phi)


def weight_at(problem: BilevelProblem, weights: Tensor, number: int) -> Tensor | None:
    """Return w_t.

    Args:
        problem: with weights of the outer loss.
        weights: those, from :func:`outer_weights` at parameters that have a graph.
        number: of the step t, from 0.

    Returns:
        ``None`` where w_t is zero whatever φ is; not at the last step, where the losses log what counts.
    """
    weight = problem.weighed(weights, number)
    last = number == problem.inner_steps - 1
    return weight if last or weights.requires_grad or weight.any() else None


def weighed(found: OuterEvaluation, weight: Tensor, phi: Params) -> OuterEvaluation:
    """Return w f with its gradients from those of f: ∂(w f)/∂φ = w ∂f/∂φ + f ∂w/∂φ.

    Args:
        found: f at a state.
        weight: w, see :func:`weight_at`.
        phi: the leaves that w hangs on.

    >>> phi = {"p": torch.tensor(3.0, requires_grad=True)}
    >>> one = torch.tensor(1.0)
    >>> weighed(OuterEvaluation(5 * one, {"w": one}, {"p": one}, None), 2 * phi["p"], phi).c
    {'p': tensor(16.)}
    """
    value, d, c, observed = found
    size = weight.detach().to(value)
    _, by_weight = gradients(weight, {}, phi)
    c = tree.add(tree.scale(c, size), by_weight, alpha=value)
    return OuterEvaluation(size * value, tree.scale(d, size), c, observed)


def _total(state: InnerState) -> Tensor:
    assert state.total is not None, "the steps of this run have left out the outer losses on the way"
    return state.total


def _observed(problem: BilevelProblem) -> Any:
    return problem.observer.observe() if problem.observer is not None else None


def _with_slopes(slopes: Slopes, theta: Params, phi: Params) -> Tensor:
    """Return f, which hangs on the graphs of ``theta`` and ``phi`` by its gradients."""
    value, d, c = slopes
    with torch.enable_grad():
        return surrogate_loss(value, [*d.values(), *c.values()], [*theta.values(), *phi.values()])


def gradients(value: Tensor, theta: Params, phi: Params) -> tuple[Params, Params]:
    """Return d = ∂value/∂θ and c = ∂value/∂φ from one pass, also where names of θ and φ coincide."""
    inputs = [*theta.values(), *phi.values()]
    grads = torch.autograd.grad(value, inputs, allow_unused=True) if value.requires_grad else [None] * len(inputs)
    return tree.like(theta, grads[: len(theta)]), tree.like(phi, grads[len(theta) :])
