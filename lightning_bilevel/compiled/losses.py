"""Values and derivatives of the losses outside of steps, by graphs: the outer loss, and the inner one at the end."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_bilevel.calculus.base import Condition
from lightning_bilevel.compiled import evaluation
from lightning_bilevel.compiled.agree import alike, precision
from lightning_bilevel.compiled.counted import counted_alike
from lightning_bilevel.compiled.evaluation import Evaluation, Evaluations
from lightning_bilevel.compiled.fingerprint import Fingerprint, fingerprint
from lightning_bilevel.compiled.graphs import Traced, backend_for
from lightning_bilevel.compiled.making import made_once
from lightning_bilevel.compiled.products import stationarity
from lightning_bilevel.compiled.program import Form, Layout
from lightning_bilevel.compiled.reasons import NotCompiled, Refusals, What
from lightning_bilevel.compiled.sight import Sight, Sights
from lightning_bilevel.compiled.watch import Level, Place
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.problem import Batch, BilevelProblem, InnerState, Slopes
from lightning_bilevel.tree import Params


class CompiledLosses:
    """Values, gradients and products by graphs where there are some.

    Args:
        sights: watches what losses do.
        refusals: what is eager.
    """

    def __init__(self, sights: Sights, refusals: Refusals) -> None:
        self._sights, self._refusals = sights, refusals
        self._parts: dict[Hashable, dict[str, Evaluation]] = {}

    def outer_value(self, problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch) -> Tensor | None:
        """Return f; ``None`` where it has to be eager."""
        found = self._found("outer", "outer", problem, state, phi, batch)
        return None if found is None else self._judged(*found, state)[0]

    def outer_slopes(self, problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch) -> Slopes | None:
        """Return f, ∂f/∂θ and ∂f/∂φ; ``None`` where they have to be eager."""
        if (found := self._found("outer", "outer_slopes", problem, state, phi, batch)) is None:
            return None
        value, *slopes = self._judged(*found, state)
        return value, *_trees(slopes, state.params, phi)

    def inner_slopes(
        self, problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch, by_theta: bool
    ) -> Slopes | None:
        """Return g, ∂g/∂θ where that is wanted, and ∂g/∂φ; ``None`` where they have to be eager."""
        name = "inner_slopes" if by_theta else "inner_slopes_by_phi"
        if (found := self._found("gradients", name, problem, state, phi, batch)) is None:
            return None
        part, functional, args = found
        results = part(args)
        part.tell(results, functional)
        value, *slopes = results[: part.outputs - part.told.total]
        return value, *_trees(slopes, state.params if by_theta else {}, phi)

    def condition(self, problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch) -> Condition | None:
        """Return the condition that ∇g is zero; ``None`` where it has to be eager."""
        theta = list(state.params.values())
        if (found := self._found("products", "curvature", problem, state, phi, batch, theta)) is None:
            return None
        part, functional, args = found
        return stationarity(part, functional, args, state.params, phi)

    def _found(
        self,
        what: What,
        name: str,
        problem: BilevelProblem,
        state: InnerState,
        phi: Params,
        batch: Batch,
        vectors: Sequence[Tensor] = (),
    ) -> tuple[Evaluation, FunctionalModule, list[Tensor]] | None:
        """Return a graph of a loss, the module and the arguments; ``None`` where it has to be eager."""
        if self._refusals.holds(what):
            return None
        try:
            made_of = fingerprint(problem, "outer_loss" if what == "outer" else "inner_loss")
        except NotCompiled as error:  # of this strategy
            self._refusals.say(what, error)
            return None
        at = InnerState(state.params, state.buffers)
        try:
            with torch.no_grad():
                return self._part(what, name, problem, made_of, at, phi, batch, vectors)
        except NotCompiled as error:
            self._refusals.refuse(what, error)
            return None

    def _part(
        self,
        what: What,
        name: str,
        problem: BilevelProblem,
        made_of: Fingerprint,
        state: InnerState,
        phi: Params,
        batch: Batch,
        vectors: Sequence[Tensor],
    ) -> tuple[Evaluation, FunctionalModule, list[Tensor]]:
        functional = made_of.functional
        level: Level = "outer" if what == "outer" else "inner"
        sight, flat = self._sights.of(made_of, problem.stacked, batch, level)
        where = (level, made_of.key, flat.rest, shapes(state.params), shapes(phi), shapes(state.buffers))
        present = sight.look(functional)
        if (where, present) not in self._parts:
            functional.turn()
            if sight.look(functional) != present:
                raise NotCompiled("it does something else at every call")
            self._sights.count(where)
            self._parts[where, present] = {}
        parts = self._parts[where, present]
        values = (*state.params.values(), *phi.values(), *state.buffers.values(), *flat.tensors)
        own = list(map(plain, values))
        args = [*own, *made_of.held]
        if name not in parts:
            layout = Layout(state, phi, Form(batch, [*flat.tensors, *made_of.held]))
            functions = Evaluations(problem, layout, functional.recorder)
            places = _places(sight, functional, layout, made_of.held)
            apart = [value.detach() for value in own]  # what a hook reads of a batch besides is no argument
            parts[name] = _made(functions, name, [*apart, *made_of.held, *vectors], functional, places)
        return parts[name], functional, args

    @staticmethod
    def _judged(part: Evaluation, functional: FunctionalModule, args: list[Tensor], state: InnerState) -> list[Tensor]:
        """Return what a graph of the outer loss returns, but for what it leaves, which is noted."""
        results, n = part(args), 1 + len(state.buffers)
        m, end = n + part.left.size, part.outputs - part.logs
        buffers = dict(zip(state.buffers, results[1:n], strict=True))
        part.left.leave(functional, buffers, results[0], results[n:m], results[end : part.outputs])
        return [results[0], *results[m:end]]


def _places(
    sight: Sight, functional: FunctionalModule, layout: Layout, held: list[Tensor]
) -> Callable[[Traced], list[Place]]:
    return lambda traced: sight.places(traced.read, traced.literal, functional, layout.buffers, held)


def _made(
    functions: Evaluations,
    name: str,
    args: list[Tensor],
    functional: FunctionalModule,
    places: Callable[[Traced], list[Place]],
) -> Evaluation:
    backend, function = backend_for(args[0].device.type), getattr(functions, name)

    def check(part: Evaluation) -> None:
        dtype = precision(args, functional.autocast_dtype)
        eager = lambda args: function(args, 0)  # noqa: E731
        alike(eager, part.all_of, functions, args, dtype)
        counted_alike(eager, part.all_of, functions, functional, args, dtype)

    make = partial(evaluation.evaluation, functions, name, args, backend, places)
    return made_once(functional, make, check, _WORDS[name], backend)


_WORDS = {
    "outer": "the outer loss",
    "outer_slopes": "the outer loss with its gradients",
    "inner_slopes": "the inner loss with its gradients",
    "inner_slopes_by_phi": "the inner loss with its outer gradient",
    "curvature": "the products with second derivatives",
}


def _trees(values: Sequence[Tensor], theta: Params, phi: Params) -> tuple[Params, Params]:
    """Return gradients by θ and by φ."""
    n = len(theta)
    return dict(zip(theta, values[:n], strict=True)), dict(zip(phi, values[n:], strict=True))


def plain(value: Tensor) -> Tensor:
    """Return a tensor as a graph takes it."""
    return value if not value.requires_grad and value.is_contiguous() else value.detach().contiguous()


def shapes(values: Params) -> Hashable:
    """Return what a graph depends on of tensors."""
    return tuple((name, value.shape, value.dtype, value.device) for name, value in values.items())
