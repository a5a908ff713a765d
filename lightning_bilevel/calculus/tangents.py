"""Tangents through one inner step, by two engines that share no derivative code.

``"double_backward"`` (default)
    The tangent of the inner gradient along (z, v) is ∂/∂θ [⟨∇_θ g, z⟩ + ⟨∇_φ g, v⟩], since the Hessian is
    symmetric. One graph per step serves all directions; only the optimizer's update is pushed by forward AD.
``"forward"``
    ``vmap(jvp)`` of the whole step with ``torch.func``.

Both are carried step by step, so memory is flat in the number of steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vmap

from lightning_bilevel import tree
from lightning_bilevel.inner_optimizers.base import OptState
from lightning_bilevel.kernels.inner_gradient import inner_gradient, is_no_derivative
from lightning_bilevel.kernels.stopped import no_grad_stops_tangents
from lightning_bilevel.problem import Batch, BilevelProblem, InnerState
from lightning_bilevel.tree import Params

PART_BYTES = 64 * 2**20
"""Tangents of θ that go through an elementwise update together; of smaller θ all do."""

PRIMAL_AND_TANGENT: Any = (None, 0)
_PRIMAL_TANGENT_AUX: Any = (None, 0, None)
"""``out_dims`` of a jvp vectorized over directions, which all share the primal."""


class Pushed(NamedTuple):
    """The end of a step with tangents: state, inner loss (``None`` of a user's solver), tangents."""

    state: InnerState
    loss: Tensor | None
    tangents: Params


def push_double_backward(
    problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch, tangents: Params, directions: Params
) -> Pushed:
    """Push by double backward; ``state`` and ``tangents`` are emptied on the way.

    Memory: θ, its tangents, ∇_θ g and its tangents, a part of the new θ, and before these the graph of the step.
    """
    pushed = _push_gradient(problem, state, phi, batch, tangents, directions)
    with no_grad_stops_tangents():
        after, tangents = _push_update(problem, state, phi, pushed.gradient, tangents, pushed.tangents, directions)
    return Pushed(replace(after, buffers=pushed.buffers), pushed.loss, tangents)


class PushedGradient(NamedTuple):
    """∇_θ g with its tangents, and what the inner loss left."""

    gradient: Params
    tangents: Params
    buffers: Params
    loss: Tensor


def _push_gradient(
    problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch, tangents: Params, directions: Params
) -> PushedGradient:
    theta, outer = tree.leaves(state.params), tree.leaves(phi)
    with torch.enable_grad():
        loss, buffers = problem.inner_loss(theta, outer, batch, state.buffers)
        inputs = [*theta.values(), *outer.values()]
        if is_no_derivative(loss):
            gradient, rows = _push_no_derivative(loss, theta, outer, tangents, directions)
            return PushedGradient(gradient, _stack_and_empty(rows), buffers, loss.detach())
        grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    cotangents = [*(tangents[name] for name in theta), *directions.values()]
    pairs = [(g, rows) for g, rows in zip(grads, cotangents, strict=True) if g is not None and g.requires_grad]
    count = tree.count(directions)

    def row(i: int) -> Params:
        if not pairs:
            return tree.zeros_like(theta)
        outputs, vectors = zip(*((g, rows[i].to(g.dtype)) for g, rows in pairs), strict=True)
        last = i == count - 1
        values = torch.autograd.grad(outputs, list(theta.values()), vectors, retain_graph=not last, allow_unused=True)
        return tree.like(theta, values)

    rows = [row(i) for i in range(count)]
    gradient = tree.detach(tree.like(theta, grads[: len(theta)]))
    return PushedGradient(gradient, _stack_and_empty(rows), buffers, loss.detach())


def _push_no_derivative(
    loss: Tensor, theta: Params, outer: Params, tangents: Params, directions: Params
) -> tuple[Params, list[Params]]:
    """Return an inner gradient G that is no derivative, so that ∂G/∂θ is not symmetric, and its tangents.

    w ↦ (w ∂G/∂θ, w ∂G/∂φ) is linear; its own vector-Jacobian product with (z, v) is ∂G/∂θ z + ∂G/∂φ v.
    """
    with inner_gradient():
        gradient = tree.grad(loss, theta, create_graph=True)
    w = tree.leaves(tree.zeros_like(theta))
    ends = {name: g for name, g in gradient.items() if g.requires_grad}
    inputs = [*theta.values(), *outer.values()]
    pulled = torch.autograd.grad(
        list(ends.values()), inputs, [w[name] for name in ends], create_graph=True, allow_unused=True
    )
    cotangents = [*(tangents[name] for name in theta), *directions.values()]
    pairs = [(p, rows) for p, rows in zip(pulled, cotangents, strict=True) if p is not None and p.requires_grad]
    rows = []
    for i in range(tree.count(directions)):
        outputs, vectors = zip(*((p, rows_of[i].to(p.dtype)) for p, rows_of in pairs), strict=True)
        values = torch.autograd.grad(outputs, list(w.values()), vectors, retain_graph=True, allow_unused=True)
        rows.append(tree.like(theta, values))
    return tree.detach(gradient), rows


def _stack_and_empty(rows: list[Params]) -> Params:
    """Return :func:`tree.stack` of ``rows``, which are emptied: at no time are all values there twice."""
    if len(rows) == 1:
        return {name: value[None] for name, value in rows[0].items()}
    return {name: torch.stack([row.pop(name) for row in rows]) for name in list(rows[0])}


def _push_update(
    problem: BilevelProblem,
    state: InnerState,
    phi: Params,
    gradient: Params,
    tangents: Params,
    gradient_tangents: Params,
    directions: Params,
) -> tuple[InnerState, Params]:
    """Push tangents of (θ, optimizer state, ∇_θ g, φ) through the optimizer's update by forward AD.

    A part at a time, each taken out of ``state``, ``gradient`` and their tangents: those before and after the update
    are never all there together.
    """
    params: Params = {}
    opt_state: OptState = {slot: {} for slot in state.opt_state}
    pushed: Params = {}
    for names in _parts(problem, tangents, list(state.params)):
        part = _taken_out(state, names)
        gradients = {name: gradient.pop(name) for name in names}
        theirs = {name: tangents.pop(name) for name in part.flat()}
        of_gradients = {name: gradient_tangents.pop(name) for name in names}
        after, theirs = _push_part(problem, part, phi, gradients, theirs, of_gradients, directions)
        params.update(after.params)
        for slot, values in after.opt_state.items():
            opt_state[slot].update(values)
        pushed.update(theirs)
    return InnerState(params, opt_state=opt_state, steps=state.steps + 1), pushed


def _parts(problem: BilevelProblem, tangents: Params, names: list[str]) -> list[list[str]]:
    """Cut θ into parts of at most ``PART_BYTES`` of tangents, which an elementwise update treats one by one."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in names:
        size += tangents[name].nbytes
        if problem.elementwise and parts[-1] and size > PART_BYTES:
            parts.append([])
            size = tangents[name].nbytes
        parts[-1].append(name)
    return parts


def _taken_out(state: InnerState, names: list[str]) -> InnerState:
    """Take some parameters and their optimizer state out of a state, which keeps the others."""
    opt_state = {
        slot: {name: values.pop(name) for name in names if name in values} for slot, values in state.opt_state.items()
    }
    return replace(state, params={name: state.params.pop(name) for name in names}, opt_state=opt_state)


def _push_part(
    problem: BilevelProblem,
    state: InnerState,
    phi: Params,
    gradient: Params,
    tangents: Params,
    gradient_tangents: Params,
    directions: Params,
) -> tuple[InnerState, Params]:
    flat, step = _own(state.flat()), state.steps + 1
    gradient = _own(gradient)

    def update(flat: Params, gradient: Params, outer: Params) -> Params:
        before = state.unflat(flat)
        params, opt_state = problem.update(before.params, gradient, before.opt_state, outer, step)
        return InnerState(params, opt_state=opt_state).flat()

    def push(t: Params, dg: Params, v: Params) -> Any:
        return jvp(update, (flat, gradient, phi), (t, dg, v))

    after, tangents = vmap(push, out_dims=PRIMAL_AND_TANGENT)(tangents, gradient_tangents, directions)
    return replace(state.unflat(tree.detach(after)), steps=step), typed_as(after, tangents)


def _own(values: Params) -> Params:
    """Return tensors with a number in memory for each entry: what repeats one has no place for a tangent of its own.

    The start of several episodes may be such a tensor, and so may the gradient of a sum.
    """
    return {
        name: value.clone(memory_format=torch.contiguous_format) if 0 in value.stride() else value
        for name, value in values.items()
    }


def typed_as(primals: Params, tangents: Params) -> Params:
    """Return tangents in the dtypes of their primals, without a graph.

    A Python number times a 0-dim tensor has a float64 tangent under ``vmap(jvp)``, and with it all that depends on it.
    """
    return {name: value.detach().to(primals[name].dtype) for name, value in tangents.items()}


def push_forward(
    problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch, tangents: Params, directions: Params
) -> Pushed:
    """Push by ``vmap(jvp)`` of the whole step."""
    before_it = _own(state.flat())

    def step(flat: Params, outer: Params) -> tuple[Params, tuple[Tensor, Params]]:
        before = state.unflat(flat)

        def inner_loss(theta: Params) -> tuple[Tensor, tuple[Tensor, Params]]:
            loss, buffers = problem.inner_loss(theta, outer, batch, state.buffers)
            return loss, (loss, buffers)

        with inner_gradient():
            gradient, aux = torch.func.grad(inner_loss, has_aux=True)(before.params)
        params, opt_state = problem.update(before.params, gradient, before.opt_state, outer, state.steps + 1)
        return InnerState(params, opt_state=opt_state).flat(), aux

    def push(tangent: Params, v: Params) -> Any:
        return jvp(step, (before_it, phi), (tangent, v), has_aux=True)

    with no_grad_stops_tangents():
        pushed = vmap(push, out_dims=_PRIMAL_TANGENT_AUX, randomness="same")(tangents, directions)
    after, tangents, (loss, buffers) = pushed
    state = replace(state.unflat(tree.detach(after)), buffers=tree.detach(buffers), steps=state.steps + 1)
    return Pushed(state, loss.detach(), typed_as(after, tangents))
