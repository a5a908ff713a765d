"""Run the T inner steps: without a graph, with one, or recorded so that it can be run backward in segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.errors import nonfinite_error
from lightning_bilevel.problem import Batch, BilevelProblem, InnerState
from lightning_bilevel.randomness import RngState
from lightning_bilevel.tree import Params

_AT_ONCE = 100


class Run(NamedTuple):
    """The end of an inner run.

    Attributes:
        state: the state after the last step.
        metrics: ``inner_loss`` of the last step, meaned over stacked episodes; empty for a user's own solver.
    """

    state: InnerState
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Segment:
    """A stretch of a recorded run: the state and the randomness it started from, and its batches."""

    state: InnerState
    randomness: RngState
    batches: Sequence[Batch]


class Graph(NamedTuple):
    """A segment with its graph: the leaves it starts from, those of φ, and its end."""

    begin: Params
    outer: Params
    end: InnerState


def run(
    problem: BilevelProblem,
    state: InnerState,
    phi: Params,
    batches: Sequence[Batch],
    create_graph: bool = False,
    taken: int = 0,
) -> Run:
    """Take one inner step per batch, or call the user's solver.

    Args:
        problem: the problem.
        state: the state to start from.
        phi: outer parameters; leaves that require gradients where ``create_graph``.
        batches: one batch per step.
        create_graph: keep the graph of the final state. Otherwise memory is flat in the number of steps.
        taken: steps of this run that were taken before; only counts in messages.

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
    if problem.solver is not None:
        return _solve(problem, state, phi, batches, create_graph)
    losses: list[Tensor] = []
    for batch in batches:
        state, loss = problem.step(state, phi, batch, create_graph=create_graph)
        note(losses, loss)
    return Run(state, last_loss(problem, losses, taken))


def note(losses: list[Tensor], loss: Tensor) -> None:
    """Append a loss to those of a run; many become one tensor, for each takes a kilobyte.

    >>> losses = []
    >>> note(losses, torch.tensor(2.0))
    >>> losses
    [tensor([2.])]
    """
    losses.append(loss.reshape(1))
    if len(losses) == _AT_ONCE:
        losses[:] = [torch.cat(losses)]


def last_loss(problem: BilevelProblem, losses: Sequence[Tensor], taken: int = 0) -> dict[str, Tensor]:
    """Return the metrics of a run from its inner losses, after a check that all are finite (one synchronization)."""
    if not losses:
        return {}
    found = torch.cat([loss.reshape(-1) for loss in losses])
    finite = torch.isfinite(found)
    if not finite.all():
        step = int(finite.logical_not().nonzero()[0])
        raise nonfinite_error(
            f"inner loss at step {taken + step + 1} of {problem.inner_steps}",
            found[step].item(),
            "Lower the inner learning rate, or take fewer inner steps.",
        )
    return {"inner_loss": found[-1] / problem.count}


def record(
    problem: BilevelProblem, state: InnerState, phi: Params, stretches: Sequence[Sequence[Batch]]
) -> tuple[Run, list[Segment | Graph]]:
    """Run without a graph and keep what is needed to run each stretch again; the last of them with its graph.

    Memory: one inner state per stretch, and the graph of the last one.
    """
    device = next(iter(state.params.values())).device
    segments: list[Segment | Graph] = []
    losses: list[Tensor] = []
    for batches in stretches[:-1]:
        segments.append(Segment(state, RngState(device), batches))
        for batch in batches:
            state, loss = problem.step(state, phi, batch)
            note(losses, loss)
    graph = _with_graph(problem, Segment(state, RngState(device), stretches[-1]), phi, losses)
    segments.append(graph)
    return Run(graph.end.detach(), last_loss(problem, losses)), segments


def pull_back(
    problem: BilevelProblem, segments: list[Segment | Graph], phi: Params, cotangent: Params
) -> tuple[Params, Params]:
    """Run recorded segments backward: c ← c + d B_t, d ← d A_t, one segment of graph at a time.

    Args:
        problem: the problem.
        segments: from :func:`record`; emptied, last first, to free memory on the way.
        phi: outer parameters.
        cotangent: d = ∂f/∂θ_T (and zeros for the optimizer's state), named as :meth:`InnerState.flat`.

    Returns:
        Σ_t d_t B_t, named as ``phi``, and the cotangent of the first segment's start.
    """
    total = tree.zeros_like(phi)
    while segments:
        through, cotangent = _back_through(problem, segments.pop(), phi, cotangent)
        total = tree.add(total, through)
    return total, cotangent


def _with_graph(problem: BilevelProblem, segment: Segment, phi: Params, losses: list[Tensor]) -> Graph:
    begin, outer = tree.leaves(segment.state.flat()), tree.leaves(phi)
    state = segment.state.unflat(begin)
    for batch in segment.batches:
        state, loss = problem.step(state, outer, batch, create_graph=True)
        note(losses, loss)
    return Graph(begin, outer, state)


def _back_through(
    problem: BilevelProblem, segment: Segment | Graph, phi: Params, cotangent: Params
) -> tuple[Params, Params]:
    """Return what φ and the start of one segment get; no part of its graph outlives the call."""
    if isinstance(segment, Segment):
        segment.randomness.restore()
        segment = _with_graph(problem, segment, phi, [])
    products = vector_jacobian(segment.end.flat(), {**segment.begin, **_prefixed(segment.outer)}, cotangent)
    return {name: products[_PREFIX + name] for name in phi}, {name: products[name] for name in segment.begin}


def vector_jacobian(outputs: Params, inputs: Params, cotangent: Params) -> Params:
    """Return Σ ⟨cotangent, ∂outputs/∂inputs⟩, zeros where nothing depends; frees the graph."""
    pairs = [(value, cotangent[name]) for name, value in outputs.items() if value.requires_grad]
    if not pairs:
        return tree.zeros_like(inputs)
    values = torch.autograd.grad(
        [value for value, _ in pairs], list(inputs.values()), [vector for _, vector in pairs], allow_unused=True
    )
    return tree.like(inputs, values)


_PREFIX = "outer:"


def _prefixed(phi: Params) -> Params:
    """Rename φ so that a shared parameter's two roles stay apart in one tree."""
    return {_PREFIX + name: value for name, value in phi.items()}


def _solve(
    problem: BilevelProblem, state: InnerState, phi: Params, batches: Sequence[Batch], create_graph: bool
) -> Run:
    assert problem.solver is not None
    with torch.set_grad_enabled(create_graph):
        params = problem.solver(state.params, phi, batches, state.buffers)
    final = InnerState(params, state.buffers, state.slots, state.steps + len(batches))
    return Run(final if create_graph else final.detach(), {})
