"""The steps that there are: of the inner optimizer, of a user's solver, and with the outer loss weighed at each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from lightning_bilevel import tree
from lightning_bilevel.calculus.base import Condition, InnerStep, Pulled, Whole, append_loss, condition
from lightning_bilevel.calculus.outer import (
    OuterEvaluation,
    gradients,
    outer_graph,
    outer_value,
    outer_value_and_grads,
    outer_weights,
    weighed,
    weight_at,
)
from lightning_bilevel.calculus.tangents import PRIMAL_AND_TANGENT, Pushed, push_double_backward, push_forward, typed_as
from lightning_bilevel.kernels.inner_gradient import inner_gradient
from lightning_bilevel.kernels.safe import forward_mode_kernels
from lightning_bilevel.kernels.stopped import no_grad_stops_tangents
from lightning_bilevel.problem import TOTAL, Batch, BilevelProblem, Episode, InnerState, WeighedBatch
from lightning_bilevel.randomness import RngState
from lightning_bilevel.tree import Params

Mode = Literal["auto", "double_backward", "forward"]


class GradientStep(InnerStep):
    """One step of the inner optimizer on the inner loss.

    Args:
        problem: the problem.
        mode: how tangents are pushed, see :mod:`lightning_bilevel.calculus.tangents`.

    Attributes:
        mode: as given.
    """

    def __init__(self, problem: BilevelProblem, mode: Mode = "auto") -> None:
        super().__init__(problem)
        self.mode = mode
        self._push = push_forward if mode == "forward" else push_double_backward

    def __call__(self, state: InnerState, phi: Params, batch: Batch) -> tuple[InnerState, Tensor]:
        """Take the step; its graph goes with the inner gradient."""
        return self._taken(state, phi, batch, tree.leaves(state.params), create_graph=False)

    def graph(self, state: InnerState, phi: Params, batches: Sequence[Batch]) -> tuple[InnerState, list[Tensor]]:
        """Take the steps and keep their graphs."""
        losses: list[Tensor] = []
        for number, batch in enumerate(batches):
            apart = self.problem.elementwise if number else _are_apart(state.params, phi)
            state, loss = self._taken(state, phi, batch, _nodes(state.params, apart), create_graph=True)
            append_loss(losses, loss)
        return state, losses

    def jvp(self, state: InnerState, phi: Params, batch: Batch, tangents: Params, directions: Params) -> Pushed:
        """Push tangents by the chosen engine."""
        return self._push(self.problem, state, phi, batch, tangents, directions)

    def fixed_point(self, state: InnerState, phi: Params, batch: Batch) -> Condition:
        """Take a step with a graph, and return how far it goes."""
        begin, outer = tree.leaves(state.flat()), tree.leaves(phi)
        state = state.unflat(begin)
        after, _ = self._taken(state, outer, batch, state.params, create_graph=True)
        with torch.enable_grad():
            return condition(tree.sub(begin, after.flat()), begin, outer)

    def _taken(
        self, state: InnerState, phi: Params, batch: Batch, theta: Params, create_graph: bool
    ) -> tuple[InnerState, Tensor]:
        problem = self.problem
        with torch.enable_grad():
            loss, buffers = problem.inner_loss(theta, phi, batch, state.buffers)
            with inner_gradient():
                grads = tree.grad(loss, theta, create_graph=create_graph)
        with torch.set_grad_enabled(create_graph):
            before = theta if create_graph else tree.detach(theta)
            params, opt_state = problem.update(before, grads, state.opt_state, phi, state.steps + 1)
        return InnerState(params, buffers, opt_state, state.steps + 1), loss.detach()


def _are_apart(theta: Params, phi: Params) -> bool:
    """Return whether no part of a start is computed from anything, nor a parameter that a loss may read."""
    outer = {id(p): name for name, p in phi.items()}
    return all(
        p.is_leaf and not isinstance(p, nn.Parameter) and outer.get(id(p), name) == name for name, p in theta.items()
    )


def _nodes(theta: Params, apart: bool) -> Params:
    """Return θ as what an inner gradient is taken by: it is not to go through one part that another is computed from.

    A start may be an outer parameter that the loss reads, and that of a head computed from φ, which is that of the
    rest; an update may compute one part of θ from another.

    Args:
        theta: θ.
        apart: whether each that has a graph is known to be a node of its own.
    """
    with torch.enable_grad():
        return {
            name: (p if apart else p.view_as(p)) if p.requires_grad else p.detach().requires_grad_()
            for name, p in theta.items()
        }


class SolverStep(InnerStep):
    """A user's own solver: one step, whose batch is all inner batches."""

    def __call__(self, state: InnerState, phi: Params, batch: Batch) -> tuple[InnerState, None]:
        """Call the solver."""
        with torch.no_grad():
            return self._solved(state, self._solve(state, phi, batch), batch), None

    def graph(self, state: InnerState, phi: Params, batches: Sequence[Batch]) -> tuple[InnerState, list[Tensor]]:
        """Call the solver with a graph."""
        (batch,) = batches
        with torch.enable_grad():
            params = self._solve(state, phi, batch)
        return self._solved(state, params, batch), []

    def jvp(self, state: InnerState, phi: Params, batch: Batch, tangents: Params, directions: Params) -> Pushed:
        """Push tangents through the solver by forward AD."""

        def solve(params: Params, outer: Params) -> Params:
            return self._solve(InnerState(params, state.buffers), outer, batch)

        def push(tangent: Params, v: Params) -> Any:
            return jvp(solve, (state.params, phi), (tangent, v))

        with no_grad_stops_tangents(), forward_mode_kernels():
            params, pushed = vmap(push, out_dims=PRIMAL_AND_TANGENT, randomness="same")(tangents, directions)
        return Pushed(self._solved(state, params, batch).detach(), None, typed_as(params, pushed))

    def fixed_point(self, state: InnerState, phi: Params, batch: Batch) -> Condition:
        """Call the solver from ``state`` with a graph; one that does not look where it starts has A = 0."""
        begin, outer = tree.leaves(state.params), tree.leaves(phi)
        with torch.enable_grad():
            after = self._solve(InnerState(begin, state.buffers), outer, batch)
            return condition(tree.sub(begin, after), begin, outer)

    def _solve(self, state: InnerState, phi: Params, batch: Batch) -> Params:
        assert self.problem.solver is not None
        return self.problem.solver(state.params, phi, batch, state.buffers)

    @staticmethod
    def _solved(state: InnerState, params: Params, batch: Batch) -> InnerState:
        return InnerState(params, state.buffers, steps=state.steps + len(batch))


class WeighingStep(InnerStep):
    """A step that adds w_t f(θ_t, φ) to the total of the run, h(φ) = Σ_t w_t f(θ_t, φ).

    The total is a part of the state, so that whatever follows the state differentiates it: reverse, checkpointed,
    truncated and forward alike. Of f first derivatives only are taken. Its draws leave no trace: θ_t is that of a run
    without it.

    Memory: in reverse, the activations of f a step, beside those of g. Cost: one gradient of f a step.

    Source: survey, arXiv 2207.11719, eq. 44–45; MAML++, arXiv 1810.09502, section 4 (multi-step loss).

    Args:
        problem: with weights of the outer loss. A batch is a :class:`~lightning_bilevel.problem.WeighedBatch`.
        step: the step of the problem without them.
    """

    def __init__(self, problem: BilevelProblem, step: InnerStep) -> None:
        super().__init__(problem)
        self._step = step
        self._judge = replace(problem.judged_at_the_end(), observer=None)  # what counts is left behind at the end

    def __call__(self, state: InnerState, phi: Params, batch: WeighedBatch) -> tuple[InnerState, Tensor | None]:
        """Take the step and add the weighed outer loss."""
        after, loss = self._step(replace(state, total=None), phi, batch.inner)
        total, weights = state.total, outer_weights(self.problem, tree.leaves(phi))
        if (weight := weight_at(self.problem, weights, batch.number)) is not None:
            with RngState(tree.device(phi)).fork():
                value, _ = outer_value(self._judge, after, phi, Episode([], batch.outer))
            total = _sum(total, weight.detach().to(value) * value)
        return replace(after, total=total), loss

    def graph(self, state: InnerState, phi: Params, batches: Sequence[WeighedBatch]) -> tuple[InnerState, list[Tensor]]:
        """Take the steps and add the weighed outer losses, all with their graphs."""
        losses: list[Tensor] = []
        total, state = state.total, replace(state, total=None)
        weights = outer_weights(self.problem, phi)
        for batch in batches:
            state, more = self._step.graph(state, phi, [batch.inner])
            append_loss(losses, *more)
            if (weight := weight_at(self.problem, weights, batch.number)) is not None:
                with RngState(tree.device(phi)).fork():
                    value, _ = outer_graph(self._judge, state, phi, Episode([], batch.outer))
                with torch.enable_grad():
                    total = _sum(total, weight.to(value) * value)
        return replace(state, total=total), losses

    def held(self, state: InnerState, phi: Params, batches: Sequence[WeighedBatch]) -> Pulled:
        """Take the steps as the identity; the outer losses on the way are differentiated all the same, right away."""
        total, state = state.total, replace(state, total=None)
        losses: list[Tensor] = []
        ends: list[OuterEvaluation] = []
        for batch in batches:
            state, loss = self._step(state, phi, batch.inner)
            append_loss(losses, loss)
            if (end := self._judged(state, phi, batch)) is not None:
                total = _sum(total, end.value)
                ends.append(end)

        def pull(cotangent: Params, wanted: Collection[str]) -> tuple[Params, Params]:
            through, of_total = tree.zeros_like(phi), cotangent.get(TOTAL, 0.0)
            for end in ends:
                through = tree.add(through, end.c, alpha=of_total)
                for name, d in end.d.items():
                    cotangent[name] = _sum(cotangent.get(name), of_total * d)
            return {name: value for name, value in cotangent.items() if name in wanted}, through

        return Pulled(replace(state, total=total), losses, pull)

    def jvp(self, state: InnerState, phi: Params, batch: WeighedBatch, tangents: Params, directions: Params) -> Pushed:
        """Push tangents through the step, and add ⟨w_t ∂f/∂θ, Z v⟩ + ⟨∂(w_t f)/∂φ, v⟩ to that of the total."""
        slope = tangents.pop(TOTAL, None)
        after, loss, tangents = self._step.jvp(replace(state, total=None), phi, batch.inner, tangents, directions)
        total, end = state.total, self._judged(after, phi, batch)
        if end is not None:
            total = _sum(total, end.value)
            slope = _sum(slope, tree.rows_dot(tangents, end.d) + tree.rows_dot(directions, end.c))
        if total is None or slope is None:
            return Pushed(after, loss, tangents)
        return Pushed(replace(after, total=total), loss, {**tangents, TOTAL: slope.to(total)})

    def whole(
        self,
        state: InnerState,
        phi: Params,
        batches: Sequence[WeighedBatch],
        outer: Batch,
        tied: Collection[str] = (),
        weights: Mapping[int, Tensor] | None = None,
    ) -> Whole | None:
        """Take the steps and the outer losses after them in one graph, which is given the weights."""
        leaves = tree.leaves(phi)
        each = outer_weights(self.problem, leaves)
        found = {n: weight_at(self.problem, each, batch.number) for n, batch in enumerate(batches, start=1)}
        there = {n: weight for n, weight in found.items() if weight is not None}
        run = self._step.whole(replace(state, total=None), phi, [batch.inner for batch in batches], outer, tied, there)
        if run is None:
            return None
        with torch.enable_grad():
            total = (torch.stack(list(there.values())).to(run.value) * run.value).sum()
        _, by_weights = gradients(total, {}, leaves)
        value = total.detach()
        return run._replace(state=replace(run.state, total=value), value=value, c=tree.add(run.c, by_weights))

    def fixed_point(self, state: InnerState, phi: Params, batch: WeighedBatch) -> Condition:
        """Return the condition of the step without the total, which has no fixed point."""
        return self._step.fixed_point(replace(state, total=None), phi, batch.inner)

    def _judged(self, after: InnerState, phi: Params, batch: WeighedBatch) -> OuterEvaluation | None:
        outer = tree.leaves(phi)
        weight = weight_at(self.problem, outer_weights(self.problem, outer), batch.number)
        if weight is None:
            return None
        with RngState(tree.device(phi)).fork():
            found = outer_value_and_grads(self._judge, after, phi, Episode([], batch.outer))
        return weighed(found, weight, outer)


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def inner_step(problem: BilevelProblem, mode: Mode = "auto") -> InnerStep:
    """Return the step of ``problem`` as its functions are now.

    Args:
        problem: the problem.
        mode: how tangents are pushed; ``"auto"`` is double backward.

    >>> from lightning_bilevel.testing import Quadratic
    >>> module = Quadratic()
    >>> (problem, phi, carry), episode = module.plain(), module.episode()
    >>> state, loss = inner_step(problem)(problem.start(carry.inner, phi), phi, episode.inner[0])
    >>> state.steps, loss.shape
    (1, torch.Size([]))
    """
    if problem.outer_loss_weights is not None:
        return WeighingStep(problem, inner_step(problem.judged_at_the_end(), mode))
    if problem.solver is not None:
        return SolverStep(problem)
    step = GradientStep(problem, mode)
    return step if problem.compiler is None else problem.compiler.compiled(step)
