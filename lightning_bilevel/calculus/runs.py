"""Runs of inner steps: forward alone, backward in segments, and forward with tangents."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vmap

from lightning_bilevel import tree
from lightning_bilevel.calculus.base import InnerStep, Pulled, append_loss
from lightning_bilevel.calculus.outer import outer_value_and_grads
from lightning_bilevel.calculus.step import Mode, inner_step
from lightning_bilevel.errors import nonfinite_error
from lightning_bilevel.kernels.safe import forward_mode_kernels
from lightning_bilevel.kernels.stopped import no_grad_stops_tangents
from lightning_bilevel.problem import Batch, BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import RngState
from lightning_bilevel.tree import Params


class Run(NamedTuple):
    """The end of an inner run, without a graph.

    Attributes:
        state: the state after the last step.
        metrics: ``inner_loss`` of the last step, the sum over stacked episodes; empty for a user's own solver.

    >>> Run(InnerState({"w": torch.ones(1)}, steps=3), {"inner_loss": torch.tensor(0.5)}).state.steps
    3
    """

    state: InnerState
    metrics: dict[str, Tensor]


def run(problem: BilevelProblem, state: InnerState, phi: Params, batches: Sequence[Batch]) -> Run:
    """Take one inner step per batch; memory is flat in their number.

    Args:
        problem: the problem.
        state: the state to start from.
        phi: outer parameters.
        batches: one batch per step, see :meth:`BilevelProblem.batches`.

    Raises:
        FloatingPointError: an inner loss is nan or infinite; the message names the step.

    >>> from lightning_bilevel import SGD, BilevelModule, Episode
    >>> class Scale(BilevelModule):
    ...     def __init__(self):
    ...         super().__init__(inner_steps=2)
    ...         self.theta, self.phi = (torch.nn.Parameter(torch.tensor(value)) for value in (0.0, 1.0))
    ...     def outer_parameters(self): return [self.phi]
    ...     def inner_loss(self, x): return (self.theta - self.phi * x).square() / 2
    ...     def outer_loss(self, x): return (self.theta - x).square() / 2
    ...     def configure_inner_optimizer(self): return SGD(lr=0.5)
    >>> functional, episode = Scale().functional(), Episode([torch.tensor(2.0)], torch.tensor(2.0))
    >>> problem, phi = functional.problem, functional.phi()
    >>> state = problem.start(InnerState(functional.theta()), phi)
    >>> run(problem, state, phi, problem.batches(episode)).state.params
    {'theta': tensor(1.5000)}
    """
    state, losses = inner_step(problem).run(state, phi, batches)
    return Run(state, last_loss(problem, losses))


def last_loss(problem: BilevelProblem, losses: Sequence[Tensor], taken: int = 0) -> dict[str, Tensor]:
    """Return the metrics of a run from its inner losses, after a check that all are finite (one synchronization).

    Args:
        problem: the problem.
        losses: in the order of the steps.
        taken: steps of this run that were taken before; only counts in messages.

    >>> from lightning_bilevel.testing import Quadratic
    >>> last_loss(Quadratic().plain().problem, [torch.tensor([2.0]), torch.tensor([1.0])])
    {'inner_loss': tensor(1.)}
    """
    if not losses:
        return {}
    found = torch.cat([loss if loss.ndim else loss.reshape(1) for loss in losses])
    finite = torch.isfinite(found)
    if not finite.all():
        step = int(finite.logical_not().nonzero()[0])
        raise nonfinite_error(
            f"inner loss at step {taken + step + 1} of {problem.inner_steps}",
            found[step].item(),
            "Lower the inner learning rate, or take fewer inner steps.",
        )
    return {"inner_loss": found[-1]}


def run_checkpointed(step: InnerStep, state: InnerState, phi: Params, segments: Sequence[Sequence[Batch]]) -> Pulled:
    """Take steps that can be run backward, with the graph of one segment at a time.

    Running backward is c ← c + d B, d ← d A from the last segment to the first; each but the last is run again from
    the state it started with, with the same random draws.

    Memory: one inner state per segment, and the graph of the longest. Cost: all steps but the last segment's twice.

    >>> from lightning_bilevel.testing import Quadratic
    >>> module = Quadratic()
    >>> (problem, phi, carry), episode = module.plain(), module.episode()
    >>> first, second, third = problem.batches(episode)
    >>> ends = []
    >>> for segments in ([[first, second, third]], [[first, second], [third]]):
    ...     pulled = run_checkpointed(inner_step(problem), carry.inner, phi, segments)
    ...     d, through = pulled.pull({"theta": torch.ones(4, dtype=torch.float64)}, ["theta"])
    ...     ends.append(through["target"])
    >>> torch.allclose(*ends)
    True
    """
    device = tree.device(phi)
    checkpoints: list[tuple[InnerState, RngState, Sequence[Batch]]] = []
    losses: list[Tensor] = []
    for batches in segments[:-1]:
        checkpoints.append((state, RngState(device), batches))
        state, taken = step.run(state, phi, batches)
        append_loss(losses, *taken)
    last = [step.vjp(state, phi, segments[-1])]
    append_loss(losses, *last[0].losses)
    end = last[0].state
    names = list(end.flat())

    def pull(cotangent: Params, wanted: Collection[str]) -> tuple[Params, Params]:
        segment = last.pop()
        with RngState(device).fork():
            cotangent, total = segment.pull(cotangent, names if checkpoints else wanted)
            while checkpoints:
                del segment  # and its graph, before the next
                segment = _again(step, phi, *checkpoints.pop())
                cotangent, through = segment.pull(cotangent, names if checkpoints else wanted)
                total = tree.add(total, through)
        return cotangent, total

    return Pulled(end, losses, pull)


def _again(step: InnerStep, phi: Params, state: InnerState, rng: RngState, batches: Sequence[Batch]) -> Pulled:
    rng.restore()
    return step.vjp(state, phi, batches)


def vector_jacobian(outputs: Params, inputs: Params, cotangent: Params) -> Params:
    """Return Σ ⟨cotangent, ∂outputs/∂inputs⟩, zeros where nothing depends; frees the graph.

    >>> inputs = {"w": torch.tensor([1.0, 2.0], requires_grad=True)}
    >>> vector_jacobian({"y": inputs["w"] ** 2}, inputs, {"y": torch.ones(2)})
    {'w': tensor([2., 4.])}
    """
    pairs = [(value, cotangent[name]) for name, value in outputs.items() if value.requires_grad and name in cotangent]
    if not pairs:
        return tree.zeros_like(inputs)
    ends, vectors = zip(*pairs, strict=True)
    return tree.like(inputs, torch.autograd.grad(ends, list(inputs.values()), vectors, allow_unused=True))


class PushedRun(NamedTuple):
    """The end of an inner run with tangents.

    Attributes:
        derivatives: D_i = d Z_T v_i + c v_i, shape ``(n,)``.
        result: the run, with c = ∂f/∂φ for ``grads``.
        tangents: Z_T v_i, stacked: ``(n, *shape)`` for every tensor of ``result.state.flat()``.

    >>> PushedRun(torch.ones(1), None, {"w": torch.ones(1, 2)}).tangents["w"].shape
    torch.Size([1, 2])
    """

    derivatives: Tensor
    result: Hypergradient
    tangents: Params


def pushed_run(
    problem: BilevelProblem,
    carried: InnerState,
    phi: Params,
    episode: Episode,
    directions: Params,
    mode: Mode = "auto",
    tangents: Params | None = None,
) -> PushedRun:
    """Return D with D_i = ⟨∇h(φ), v_i⟩ = d Z_T v_i + c v_i, without ever holding ∇h, and the tangents at the end.

    Args:
        problem: the problem.
        carried: the inner state to start from, see :meth:`BilevelProblem.start`.
        phi: outer parameters.
        episode: inner and outer batches.
        directions: v, stacked: ``(n, *shape)`` per outer parameter.
        mode: how tangents are pushed.
        tangents: those of ``carried``, from earlier steps, ``(n, *shape)`` for tensors of ``carried.flat()``; what is
            missing is zero.

    >>> from lightning_bilevel.testing import Quadratic
    >>> module = Quadratic()
    >>> (problem, phi, carry), episode = module.plain(), module.episode()
    >>> axes = {"target": torch.eye(3, dtype=torch.float64)}
    >>> slopes = pushed_run(problem, carry.inner, phi, episode, axes).derivatives
    >>> torch.allclose(slopes, module.solution(episode).grads["target"])
    True

    Of θ = (I − 0.2 A)³ θ_0 + …, from tangents of θ_0 along a direction that does nothing:

    >>> nowhere, before = {"target": torch.zeros(4, 3).double()}, {"theta": torch.eye(4).double()}
    >>> pushed = pushed_run(problem, carry.inner, phi, episode, nowhere, tangents=before).tangents["theta"]
    >>> torch.allclose(pushed, torch.linalg.matrix_power(torch.eye(4) - 0.2 * module.A, 3))
    True
    """
    step = inner_step(problem, mode)
    with forward_mode_kernels() if mode == "forward" else nullcontext():
        state, pushed = _start_tangents(problem, carried, phi, directions, tangents or {})
        state, losses, pushed = step.push(state, phi, problem.batches(episode), pushed, directions)
    end = outer_value_and_grads(problem, state, phi, episode)
    derivatives = tree.rows_dot(pushed, end.d) + tree.rows_dot(directions, end.c)
    result = Hypergradient(end.value, end.c, state, last_loss(problem, losses), observed=end.observed)
    return PushedRun(derivatives, result, pushed)


def _start_tangents(
    problem: BilevelProblem, carried: InnerState, phi: Params, directions: Params, before_it: Params
) -> tuple[InnerState, Params]:
    """Push every direction through Ω_0: the tangent of a shared parameter is its part of v.

    What is carried over has the tangents ``before_it``, or none.
    """
    before = RngState(tree.device(phi))
    state = problem.start(carried, phi)
    after = RngState(tree.device(phi))

    moving = {name: value for name, value in carried.flat().items() if name in before_it}

    def start(outer: Params, own: Params) -> Params:
        return problem.start(carried.unflat({**carried.flat(), **own}), outer).flat()

    def push(v: Params, own: Params) -> Params:
        pushed: Params = jvp(start, (phi, moving), (v, own))[1]
        return pushed

    before.restore()  # a start that draws is pushed through as it was drawn
    with no_grad_stops_tangents():
        tangents = vmap(push, randomness="same")(directions, {name: before_it[name] for name in moving})
    after.restore()
    return state.detach(), tree.detach(tangents)
