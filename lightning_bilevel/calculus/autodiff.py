"""Derivatives of a bilevel problem: tangents of inner steps, directional derivatives of h, Hessian and mixed products.

Two engines carry a tangent (Z v, one per direction) through an inner step:

``"double_backward"`` (default)
    The tangent of the inner gradient along (z, v) is ∂/∂θ [⟨∇_θ g, z⟩ + ⟨∇_φ g, v⟩], since the Hessian is
    symmetric. One graph per step serves all directions; only the optimizer's update is pushed by forward AD.
``"forward"``
    ``vmap(jvp)`` of the whole step with ``torch.func``. Shares no derivative code with the first.

Both are carried step by step, so memory is flat in the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vmap

from lightning_bilevel import tree
from lightning_bilevel.calculus.inner_loop import last_loss, note, run
from lightning_bilevel.inner_optimizers.base import Slots
from lightning_bilevel.kernels.safe import forward_mode_kernels
from lightning_bilevel.problem import Batch, BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.tree import Params

Mode = Literal["auto", "double_backward", "forward"]
Pushed = tuple[InnerState, Tensor, Params]

PART_BYTES = 64 * 2**20
"""Tangents of θ that go through an elementwise update together; of smaller θ all do."""

_PRIMAL_AND_TANGENT: Any = (None, 0)
_PRIMAL_TANGENT_AUX: Any = (None, 0, None)
"""``out_dims`` of a jvp vectorized over directions, which all share the primal."""


def directional_derivatives(
    problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, directions: Params, mode: Mode = "auto"
) -> tuple[Tensor, Hypergradient]:
    """Return D with D_i = ⟨∇h(φ), v_i⟩ = d Z_T v_i + c v_i, without ever holding ∇h.

    Args:
        problem: the problem.
        memory: the inner state to start from, see :meth:`BilevelProblem.start`.
        phi: outer parameters.
        episode: inner and outer batches.
        directions: v, stacked: ``(n, *shape)`` per outer parameter.
        mode: the engine; ``"auto"`` is double backward, and forward where a user's solver leaves no other.

    Returns:
        D of shape ``(n,)`` and the run it belongs to, whose ``grads`` are c = ∂f/∂φ, not ∇h.
    """
    if problem.solver is not None:
        return _through_solver(problem, memory, phi, episode, directions)
    push = _push_forward if mode == "forward" else _push_double_backward
    with forward_mode_kernels() if mode == "forward" else nullcontext():
        state, tangents = _start_tangents(problem, memory, phi, directions)
        losses: list[Tensor] = []
        for batch in problem.batches(episode):
            state, loss, tangents = push(problem, state, phi, batch, tangents, directions)
            note(losses, loss)
    value, d, c = outer_gradients(problem, state, phi, episode)
    derivatives = tree.inner_products(tangents, d) + tree.inner_products(directions, c)
    return derivatives, Hypergradient(value, c, state, last_loss(problem, losses))


def outer_gradients(
    problem: BilevelProblem, state: InnerState, phi: Params, episode: Episode
) -> tuple[Tensor, Params, Params]:
    """Return f, d = ∂f/∂θ and c = ∂f/∂φ at ``state``, all detached."""
    theta, outer = tree.leaves(state.params), tree.leaves(phi)
    with torch.enable_grad():
        value = problem.outer_loss(theta, outer, episode.outer, state.buffers)
        d, c = gradients(value, theta, outer)
    return value.detach(), d, c


def hessian_product(
    problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch
) -> tuple[Callable[[Params], Params], Callable[[Params], Params]]:
    """Return v ↦ ∂²g/∂θ² v and v ↦ v ∂²g/∂θ∂φ at ``state``, both on one graph of the inner gradient.

    Memory: the graph lives as long as the returned functions do.
    """
    theta, outer = tree.leaves(state.params), tree.leaves(phi)
    with torch.enable_grad():
        loss, _ = problem.inner_loss(theta, outer, batch, state.buffers)
        gradient = tree.grad(loss, theta, create_graph=True)

    def product(vector: Params, inputs: Params) -> Params:
        pairs = [(gradient[name], vector[name]) for name in theta if gradient[name].requires_grad]
        if not pairs:
            return tree.zeros_like(inputs)
        outputs, vectors = zip(*pairs, strict=True)
        values = torch.autograd.grad(outputs, list(inputs.values()), vectors, retain_graph=True, allow_unused=True)
        return tree.like(inputs, values)

    return lambda v: product(v, theta), lambda v: product(v, outer)


def gradients(value: Tensor, theta: Params, phi: Params) -> tuple[Params, Params]:
    """Return d = ∂value/∂θ and c = ∂value/∂φ from one pass, also where names of θ and φ coincide."""
    inputs = [*theta.values(), *phi.values()]
    grads = torch.autograd.grad(value, inputs, allow_unused=True) if value.requires_grad else [None] * len(inputs)
    return tree.like(theta, grads[: len(theta)]), tree.like(phi, grads[len(theta) :])


def _start_tangents(
    problem: BilevelProblem, memory: InnerState, phi: Params, directions: Params
) -> tuple[InnerState, Params]:
    """Push every direction through Ω_0: the tangent of a shared parameter is its part of v."""
    shape = problem.start(memory, phi)

    def start(outer: Params) -> Params:
        return problem.start(memory, outer).flat()

    with torch.no_grad():
        tangents = vmap(lambda v: jvp(start, (phi,), (v,))[1])(directions)
    return shape.detach(), tangents


def _push_double_backward(
    problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch, tangents: Params, directions: Params
) -> Pushed:
    """Push by double backward; ``state`` and ``tangents`` are emptied on the way.

    Memory: θ, its tangents, ∇_θ g and its tangents, a part of the new θ, and before these the graph of the step.
    """
    pushed = _push_gradient(problem, state, phi, batch, tangents, directions)
    with torch.no_grad():
        after, tangents = _push_update(problem, state, phi, pushed.gradient, tangents, pushed.tangents, directions)
    return replace(after, buffers=pushed.buffers), pushed.loss, tangents


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
        grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    cotangents = [*(tangents[name] for name in theta), *directions.values()]
    pairs = [(g, rows) for g, rows in zip(grads, cotangents, strict=True) if g is not None and g.requires_grad]
    count = next(iter(directions.values())).shape[0]

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
    slots: Slots = {slot: {} for slot in state.slots}
    pushed: Params = {}
    for names in _parts(problem, tangents, list(state.params)):
        part = _taken_out(state, names)
        gradients = {name: gradient.pop(name) for name in names}
        theirs = {name: tangents.pop(name) for name in part.flat()}
        of_gradients = {name: gradient_tangents.pop(name) for name in names}
        after, theirs = _push_part(problem, part, phi, gradients, theirs, of_gradients, directions)
        params.update(after.params)
        for slot, values in after.slots.items():
            slots[slot].update(values)
        pushed.update(theirs)
    return InnerState(params, slots=slots, steps=state.steps + 1), pushed


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
    """Take some parameters and their slots out of a state, which keeps the others."""
    slots = {slot: {name: values.pop(name) for name in names if name in values} for slot, values in state.slots.items()}
    return replace(state, params={name: state.params.pop(name) for name in names}, slots=slots)


def _push_part(
    problem: BilevelProblem,
    state: InnerState,
    phi: Params,
    gradient: Params,
    tangents: Params,
    gradient_tangents: Params,
    directions: Params,
) -> tuple[InnerState, Params]:
    flat, step = state.flat(), state.steps + 1

    def update(flat: Params, gradient: Params, outer: Params) -> Params:
        before = state.unflat(flat)
        params, slots = problem.update(before.params, gradient, before.slots, outer, step)
        return InnerState(params, slots=slots).flat()

    if problem.update_uses_phi:

        def push(t: Params, dg: Params, v: Params) -> Any:
            return jvp(update, (flat, gradient, phi), (t, dg, v))
    else:

        def push(t: Params, dg: Params, v: Params) -> Any:
            return jvp(lambda x, g: update(x, g, phi), (flat, gradient), (t, dg))

    after, tangents = vmap(push, out_dims=_PRIMAL_AND_TANGENT)(tangents, gradient_tangents, directions)
    return replace(state.unflat(after), steps=step), tangents


def _push_forward(
    problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch, tangents: Params, directions: Params
) -> Pushed:
    def step(flat: Params, outer: Params) -> tuple[Params, tuple[Tensor, Params]]:
        before = state.unflat(flat)

        def inner_loss(theta: Params) -> tuple[Tensor, tuple[Tensor, Params]]:
            loss, buffers = problem.inner_loss(theta, outer, batch, state.buffers)
            return loss, (loss, buffers)

        gradient, aux = torch.func.grad(inner_loss, has_aux=True)(before.params)
        params, slots = problem.update(before.params, gradient, before.slots, outer, state.steps + 1)
        return InnerState(params, slots=slots).flat(), aux

    def push(tangent: Params, v: Params) -> Any:
        return jvp(step, (state.flat(), phi), (tangent, v), has_aux=True)

    with torch.no_grad():
        pushed = vmap(push, out_dims=_PRIMAL_TANGENT_AUX, randomness="same")(tangents, directions)
    after, tangents, (loss, buffers) = pushed
    return replace(state.unflat(after), buffers=buffers, steps=state.steps + 1), loss, tangents


def _through_solver(
    problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, directions: Params
) -> tuple[Tensor, Hypergradient]:
    """Push directions through a user's differentiable solver by forward AD."""

    def h(outer: Params) -> Tensor:
        final = run(problem, problem.start(memory, outer), outer, problem.batches(episode), create_graph=True).state
        return problem.outer_loss(final.params, outer, episode.outer, final.buffers)

    with torch.no_grad():
        final = run(problem, problem.start(memory, phi), phi, problem.batches(episode)).state
        value, _, c = outer_gradients(problem, final, phi, episode)
        with forward_mode_kernels():
            derivatives = vmap(lambda v: jvp(h, (phi,), (v,))[1], randomness="same")(directions)
    return derivatives, Hypergradient(value, c, final, {})
