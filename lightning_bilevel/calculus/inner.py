"""The inner loss at a state: the one place that evaluates g for an estimate outside of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.outer import gradients
from lightning_bilevel.problem import Batch, BilevelProblem, InnerState
from lightning_bilevel.tree import Params


class InnerEvaluation(NamedTuple):
    """The inner loss at a state, detached.

    Attributes:
        value: g(θ, φ), the mean over batches.
        d: ∂g/∂θ.
        c: ∂g/∂φ.

    >>> InnerEvaluation(torch.tensor(1.0), {"w": torch.ones(1)}, {"p": torch.zeros(1)}).d
    {'w': tensor([1.])}
    """

    value: Tensor
    d: Params
    c: Params


def inner_value_and_grads(
    problem: BilevelProblem, state: InnerState, phi: Params, batches: Sequence[Batch], by_theta: bool = True
) -> InnerEvaluation:
    """Return g, ∂g/∂θ and ∂g/∂φ at ``state``, the means over ``batches``; one that comes again is evaluated once.

    Args:
        problem: the problem; ``problem.stationary()`` has the weight decay in its inner loss, too.
        state: where.
        phi: outer parameters.
        batches: those of a run, see :meth:`BilevelProblem.batches`.
        by_theta: whether ∂g/∂θ is wanted; it is empty otherwise, which takes less time.

    On g = ½ θᵀAθ − θᵀ(Bφ + x):

    >>> from lightning_bilevel.testing import Quadratic
    >>> module = Quadratic()
    >>> (problem, phi, carry), episode = module.plain(), module.episode()
    >>> c = inner_value_and_grads(problem, carry.inner, phi, problem.batches(episode)).c
    >>> torch.allclose(c["target"], -module.B.T @ carry.inner.params["theta"])
    True
    """
    often: dict[int, tuple[Batch, int]] = {}
    for batch in batches:
        _, count = often.get(id(batch), (batch, 0))
        often[id(batch)] = batch, count + 1
    parts: list[InnerEvaluation] = []
    for batch, count in often.values():
        if problem.compiler is not None and (
            (slopes := problem.compiler.losses.inner_slopes(problem, state, phi, batch, by_theta)) is not None
        ):
            parts.append(_weighed(InnerEvaluation(*slopes), count / len(batches)))
            continue
        theta, outer = tree.leaves(state.params) if by_theta else {}, tree.leaves(phi)
        with torch.enable_grad():
            loss, _ = problem.inner_loss(theta or state.params, outer, batch, state.buffers)
            loss = loss * (count / len(batches))
            parts.append(InnerEvaluation(loss.detach(), *gradients(loss, theta, outer)))
    value, d, c = parts[0]
    for part in parts[1:]:
        value, d, c = value + part.value, tree.add(d, part.d), tree.add(c, part.c)
    return InnerEvaluation(value, d, c)


def _weighed(found: InnerEvaluation, weight: float) -> InnerEvaluation:
    if weight == 1:
        return found
    return InnerEvaluation(found.value * weight, tree.scale(found.d, weight), tree.scale(found.c, weight))
