"""What a hypergradient strategy sees: a bilevel problem as pure functions of named tensors.

Inner parameters θ and outer parameters φ are ``Params``. The problem is

    min_φ h(φ) = f(θ_T(φ), φ),    θ_t = Ω_t(θ_{t-1}, φ),    θ_0 = Ω_0(φ),

with inner loss g (inside Ω), outer loss f and inner steps T.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils.data._utils.collate import default_collate_fn_map

from lightning_bilevel import tree
from lightning_bilevel.inner_optimizers.base import Slots
from lightning_bilevel.randomness import RngState
from lightning_bilevel.tree import Params

Batch = Any

InnerLoss = Callable[[Params, Params, Batch, Params], tuple[Tensor, Params]]
"""(θ, φ, batch, buffers) to the scalar g and the buffers it left behind."""

OuterLoss = Callable[[Params, Params, Batch, Params], Tensor]
"""(θ, φ, batch, buffers) to the scalar f."""

Initial = Callable[[Params, Params], Params]
"""Ω_0: (θ of the memory, φ) to θ_0."""

InitSlots = Callable[[Params, Params], Slots]
"""(θ_0, φ) to the inner optimizer's first state."""

Update = Callable[[Params, Params, Slots, Params, int], tuple[Params, Slots]]
"""(θ, ∇_θ g, optimizer state, φ, number of the step from 1) to the next θ and optimizer state."""

Solver = Callable[[Params, Params, Sequence[Batch], Params], Params]
"""(θ_0, φ, inner batches, buffers) to θ_T: a user's own solver in place of the gradient loop."""


class Episode(NamedTuple):
    """One inner problem and the outer batch that judges its solution.

    A ``NamedTuple``, so that Lightning moves it to the device like any batch.

    Attributes:
        inner: the inner batches in order; cycled when there are fewer than inner steps. A batch may be anything, also
            ``None`` where the inner problem has no data.
        outer: the batch for the outer loss.

    >>> Episode(inner=["support"], outer="query")
    Episode(inner=['support'], outer='query')
    """

    inner: Sequence[Batch]
    outer: Batch


# A loader of tasks with a batch size: lists of episodes, not one episode of stacked batches.
default_collate_fn_map[Episode] = lambda batch, *, collate_fn_map=None: list(batch)


@dataclass(frozen=True)
class InnerState:
    """Everything an inner step reads and writes.

    Attributes:
        params: θ, keyed by parameter name; what is carried over from before lacks the shared ones.
        buffers: module buffers such as BatchNorm statistics, keyed by buffer name; never differentiated.
        slots: inner optimizer state; empty before the first step.
        steps: inner steps taken so far.

    >>> state = InnerState({"w": torch.ones(1)}, slots={"momentum": {"w": torch.zeros(1)}}, steps=3)
    >>> state.unflat({"w": torch.zeros(1), "momentum:w": torch.ones(1)})
    InnerState(params={'w': tensor([0.])}, buffers={}, slots={'momentum': {'w': tensor([1.])}}, steps=3)
    """

    params: Params
    buffers: Params = field(default_factory=dict)
    slots: Slots = field(default_factory=dict)
    steps: int = 0

    def flat(self) -> Params:
        """Return θ and the optimizer state, all that is differentiated, as one tree.

        >>> InnerState({"w": torch.ones(1)}, slots={"momentum": {"w": torch.zeros(1)}}).flat()
        {'w': tensor([1.]), 'momentum:w': tensor([0.])}
        """
        slots = {f"{slot}:{name}": value for slot, values in self.slots.items() for name, value in values.items()}
        return {**self.params, **slots}

    def unflat(self, flat: Params) -> InnerState:
        """Return this state with the tensors of ``flat``, as :meth:`flat` names them."""
        params = {name: flat[name] for name in self.params}
        slots = {slot: {name: flat[f"{slot}:{name}"] for name in values} for slot, values in self.slots.items()}
        return replace(self, params=params, slots=slots)

    def detach(self) -> InnerState:
        """Cut θ and the optimizer state off their graphs."""
        return self.unflat(tree.detach(self.flat()))


class Hypergradient(NamedTuple):
    """An estimate of ∇h(φ).

    Attributes:
        value: h(φ), the outer loss at θ_T, a 0-dim tensor.
        grads: the estimate, keyed by outer parameter name, shaped as the parameters.
        state: the inner state after the last step; ``state.params`` is θ_T.
        metrics: 0-dim tensors to log, such as ``inner_loss`` of the last inner step.

    >>> Hypergradient(torch.tensor(2.0), {"w": torch.ones(1)}, InnerState({"v": torch.zeros(1)}), {}).grads["w"]
    tensor([1.])
    """

    value: Tensor
    grads: Params
    state: InnerState
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class BilevelProblem:
    """A bilevel problem as pure functions; what every hypergradient strategy is written against.

    Attributes:
        inner_loss: g, see :data:`InnerLoss`.
        outer_loss: f, see :data:`OuterLoss`.
        initial: Ω_0, see :data:`Initial`.
        init_slots: the inner optimizer's first state, see :data:`InitSlots`.
        update: the inner optimizer's step, see :data:`Update`.
        inner_steps: T, the number of inner steps.
        shared: names that are in θ and in φ: there θ_0 = φ.
        solver: the user's own inner solver, see :data:`Solver`, or ``None`` for the gradient loop.
        differentiable_solve: whether autograd may go through ``solver``.
        update_uses_phi: whether ``update`` depends on φ directly (a learned learning rate, say).
        elementwise: whether ``update`` treats every entry of θ alike, so that stacked θ can pass as one.
        proximal: λ of the term λ/2 ‖θ − φ‖² that ``inner_loss`` adds for shared parameters.
        stateful: whether the inner optimizer has state besides θ.
        warm: whether θ and the optimizer's state continue from one outer step to the next.
        vectorizable: how many copies of θ one vectorized call should hold at most; 1 where loops are faster.
        count: episodes stacked in this problem.

    That of a module is ``module.functional().problem``. One by hand, with gradient descent at the rate 0.5:

    >>> problem = BilevelProblem(
    ...     inner_loss=lambda theta, phi, batch, buffers: ((theta["w"] - phi["p"] * batch).square() / 2, buffers),
    ...     outer_loss=lambda theta, phi, batch, buffers: (theta["w"] - batch).square() / 2,
    ...     initial=lambda memory, phi: memory,
    ...     init_slots=lambda theta, phi: {},
    ...     update=lambda theta, grads, slots, phi, step: ({"w": theta["w"] - 0.5 * grads["w"]}, slots),
    ...     inner_steps=1,
    ... )
    >>> phi = {"p": torch.tensor(2.0)}
    >>> state = problem.start(InnerState({"w": torch.tensor(0.0)}), phi)
    >>> state, loss = problem.step(state, phi, batch=torch.tensor(1.0))
    >>> state.params, loss
    ({'w': tensor(1.)}, tensor(2.))
    """

    inner_loss: InnerLoss
    outer_loss: OuterLoss
    initial: Initial
    init_slots: InitSlots
    update: Update
    inner_steps: int
    shared: frozenset[str] = frozenset()
    solver: Solver | None = None
    differentiable_solve: bool = True
    update_uses_phi: bool = True
    elementwise: bool = True
    proximal: float = 0.0
    stateful: bool = False
    warm: bool = False
    vectorizable: int = 2**30
    count: int = 1

    def batches(self, episode: Episode) -> list[Batch]:
        """Return the T inner batches of an episode, cycled; a user's solver gets them as they are."""
        if self.solver is not None:
            return list(episode.inner)
        return [episode.inner[t % len(episode.inner)] for t in range(self.inner_steps)]

    def start(self, memory: InnerState, phi: Params) -> InnerState:
        """Return the state before the first step: θ_0 = Ω_0(φ) and the optimizer's state, differentiable in φ."""
        params = self.initial(memory.params, phi)
        fresh = self.init_slots(params, phi)
        slots = {slot: {**values, **memory.slots.get(slot, {})} for slot, values in fresh.items()}
        return replace(memory, params=params, slots=slots)

    def step(
        self, state: InnerState, phi: Params, batch: Batch, create_graph: bool = False
    ) -> tuple[InnerState, Tensor]:
        """Return θ_t = Ω_t(θ_{t-1}, φ) and the inner loss at θ_{t-1}, detached.

        Args:
            state: the state before the step.
            phi: outer parameters; leaves that require gradients where ``create_graph``.
            batch: the inner batch.
            create_graph: keep the graph of the new state in φ and the old one.
        """
        theta = {
            name: p if create_graph and p.requires_grad else p.detach().requires_grad_()
            for name, p in state.params.items()
        }
        with torch.enable_grad():
            loss, buffers = self.inner_loss(theta, phi, batch, state.buffers)
            grads = tree.grad(loss, theta, create_graph=create_graph)
        with torch.set_grad_enabled(create_graph):
            before = theta if create_graph else tree.detach(theta)
            params, slots = self.update(before, grads, state.slots, phi, state.steps + 1)
        return InnerState(params, buffers, slots, state.steps + 1), loss.detach()

    def perturbed(self, count: int) -> BilevelProblem:
        """Return the problem at ``count`` values of φ at once, on the same batches.

        φ, θ, optimizer state and buffers gain a leading dimension of size ``count``. The inner loss is the sum
        over them, the outer loss a vector of shape ``(count,)``; random masks are the same for all.
        """
        initial = vmap(self.initial, in_dims=(None, 0))

        def inner_loss(theta: Params, phi: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
            of_each = lambda theta, phi, buffers: self.inner_loss(theta, phi, batch, buffers)  # noqa: E731
            losses, buffers = vectorized(of_each, theta, phi, buffers, randomness="same")
            return losses.sum(), buffers

        def outer_loss(theta: Params, phi: Params, batch: Batch, buffers: Params) -> Tensor:
            of_each = lambda theta, phi, buffers: self.outer_loss(theta, phi, batch, buffers)  # noqa: E731
            losses: Tensor = vectorized(of_each, theta, phi, buffers, randomness="same")
            return losses

        def update(params: Params, grads: Params, slots: Slots, phi: Params, step: int) -> tuple[Params, Slots]:
            return vmap(lambda p, g, s, o: self.update(p, g, s, o, step))(params, grads, slots, phi)

        return replace(
            self,
            inner_loss=inner_loss,
            outer_loss=outer_loss,
            initial=lambda memory, phi: initial(memory, phi),
            init_slots=vmap(self.init_slots),
            update=update,
        )

    def stack(self, count: int) -> BilevelProblem:
        """Return the problem of ``count`` episodes at once, again a bilevel problem.

        θ, optimizer state, buffers and batches gain a leading dimension of size ``count``; φ does not. The inner
        loss is the *sum* over episodes, so that every episode has its own gradient, and the outer loss the
        *mean*, so that the hypergradient is the mean of theirs.

        Args:
            count: number of episodes. Batches of the stacked problem are made by :func:`stack_episodes`.
        """

        def initial(memory: Params, phi: Params) -> Params:
            if memory:
                return vmap(self.initial, in_dims=(0, None), randomness="different")(memory, phi)
            # All is shared: the starts are equal, unless the user's hook draws.
            device = next(iter(phi.values())).device
            randomness = RngState(device)
            start = self.initial(memory, phi)
            if randomness.untouched():
                return tree.map(lambda value: value.expand(count, *value.shape), start)
            randomness.restore()
            each = torch.empty(count, device=device)
            return vmap(lambda _: self.initial(memory, phi), randomness="different")(each)

        def inner_loss(theta: Params, phi: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
            of_each = lambda theta, batch, buffers: self.inner_loss(theta, phi, batch, buffers)  # noqa: E731
            losses, buffers = vectorized(of_each, theta, batch, buffers, randomness="different")
            return losses.sum(), buffers

        def outer_loss(theta: Params, phi: Params, batch: Batch, buffers: Params) -> Tensor:
            of_each = lambda theta, batch, buffers: self.outer_loss(theta, phi, batch, buffers)  # noqa: E731
            losses: Tensor = vectorized(of_each, theta, batch, buffers, randomness="different")
            return losses.mean()

        def update(params: Params, grads: Params, slots: Slots, phi: Params, step: int) -> tuple[Params, Slots]:
            one = lambda p, g, s, outer_params: self.update(p, g, s, outer_params, step)  # noqa: E731
            return vmap(one, in_dims=(0, 0, 0, None))(params, grads, slots, phi)

        return replace(
            self,
            inner_loss=inner_loss,
            outer_loss=outer_loss,
            initial=initial,
            init_slots=self.init_slots if self.elementwise else vmap(self.init_slots, in_dims=(0, None)),
            update=self.update if self.elementwise else update,
            count=count,
        )


def stackable(a: Episode, b: Episode) -> bool:
    """Return whether two episodes have the same structure, shapes and dtypes, so that they can be stacked.

    Batches are tensors in tuples, lists and dicts; anything else cannot be vectorized over.
    """
    return _alike(list(a.inner), list(b.inner)) and _alike(a.outer, b.outer)


def stack_episodes(episodes: Sequence[Episode]) -> Episode:
    """Stack the tensors of :func:`stackable` episodes along a new first dimension."""
    return Episode(_stacked([list(episode.inner) for episode in episodes]), _stacked([e.outer for e in episodes]))


def vectorized(fn: Callable[..., Any], *args: Any, randomness: str) -> Any:
    """Return ``vmap(fn, randomness=randomness)(*args)`` for arguments that are tensors in tuples, lists and dicts.

    vmap walks nested arguments several times, at a fifth of the cost of a small net's loss; it gets plain ones here.
    """
    tensors: list[Tensor] = []
    _collect(args, tensors)
    return vmap(lambda *flat: fn(*_rebuilt(args, iter(flat))), randomness=randomness)(*tensors)


def _collect(value: Any, tensors: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors.append(value)
    else:
        for part in value.values() if isinstance(value, dict) else value:
            _collect(part, tensors)


def _rebuilt(like: Any, tensors: Iterator[Tensor]) -> Any:
    """Return ``like`` with its tensors replaced, in the order of :func:`_collect`."""
    if isinstance(like, Tensor):
        return next(tensors)
    if type(like) is dict:
        return {key: _rebuilt(part, tensors) for key, part in like.items()}
    return _container(like, [_rebuilt(part, tensors) for part in (like.values() if isinstance(like, dict) else like)])


def _container(like: Any, parts: list[Any]) -> Any:
    """Return a container of the type of ``like`` with ``parts`` in it."""
    if isinstance(like, dict):
        filled = copy.copy(like)
        filled.update(zip(like, parts, strict=True))
        return filled
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


def _alike(a: Any, b: Any) -> bool:
    # By hand rather than by torch's pytree: this walks every episode of every step, and is several times faster.
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(value, b[key]) for key, value in a.items())
    return isinstance(a, (list, tuple)) and len(a) == len(b) and all(map(_alike, a, b))


def _stacked(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.stack(list(values))
    if isinstance(first, dict):
        return _container(first, [_stacked([value[key] for value in values]) for key in first])
    return _container(first, [_stacked(column) for column in zip(*values, strict=True)])
