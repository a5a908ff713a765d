"""What a hypergradient strategy sees: a bilevel problem as pure functions of named tensors.

Inner parameters θ and outer parameters φ are ``Params``. The problem is

    min_φ h(φ) = f(θ_T(φ), φ),    θ_t = Ω_t(θ_{t-1}, φ),    θ_0 = Ω_0(φ),

with inner loss g (inside Ω), outer loss f and inner steps T. The step Ω_t and its derivatives are made of these
functions in :mod:`lightning_bilevel.calculus`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils.data._utils.collate import default_collate_fn_map

from lightning_bilevel import tree
from lightning_bilevel.inner_optimizers.base import OptState
from lightning_bilevel.kernels.attention import unfused
from lightning_bilevel.randomness import RngState
from lightning_bilevel.stacking import alike, stacked, vectorized
from lightning_bilevel.tree import Params

Batch = Any

InnerLoss = Callable[[Params, Params, Batch, Params], tuple[Tensor, Params]]
"""(θ, φ, batch, buffers) to the scalar g and the buffers it left behind."""

OuterLoss = Callable[[Params, Params, Batch, Params], Tensor]
"""(θ, φ, batch, buffers) to the scalar f."""

Initial = Callable[[Params, Params], Params]
"""Ω_0: (θ that is carried over, φ) to θ_0."""

InitialFrom = Callable[[Params, Params, Sequence[Batch]], Params]
"""Ω_0 of an episode: (θ that is carried over, φ, inner batches) to θ_0."""

InitOptState = Callable[[Params, Params], OptState]
"""(θ_0, φ) to the inner optimizer's first state."""

Update = Callable[[Params, Params, OptState, Params, int], tuple[Params, OptState]]
"""(θ, ∇_θ g, optimizer state, φ, number of the step from 1) to the next θ and optimizer state."""

OuterWeights = Callable[[Params], Tensor]
"""φ to the weights w of h(φ) = Σ_t w_t f(θ_t, φ), one for each of θ_1 … θ_T: shape ``(T,)``."""

Penalty = Callable[[Params, Params], Tensor]
"""(θ, φ) to what the inner optimizer's updates decrease besides g, see :meth:`InnerOptimizer.penalty`."""

Solver = Callable[[Params, Params, Sequence[Batch], Params], Params]
"""(θ_0, φ, inner batches, buffers) to θ_T: a user's own solver in place of the gradient loop."""


class Episode(NamedTuple):
    """One inner problem and the outer batch that judges its solution.

    A ``NamedTuple``, so that Lightning moves it to the device like any batch.

    Attributes:
        inner: the inner batches in order; cycled when there are fewer than inner steps. A batch may be anything, also
            ``None`` where the inner problem has no data. One that is a mapping, a ``NamedTuple`` or a dataclass may
            stand here by itself; one that is a list, such as a ``DataLoader`` yields, in brackets.
        outer: the batch for the outer loss.

    >>> Episode(inner=["support"], outer="query")
    Episode(inner=['support'], outer='query')
    """

    inner: Sequence[Batch]
    outer: Batch


# A loader of tasks with a batch size: lists of episodes, not one episode of stacked batches.
default_collate_fn_map[Episode] = lambda batch, *, collate_fn_map=None: list(batch)


class WeighedBatch(NamedTuple):
    """The batch of an inner step after which the outer loss is evaluated, see :data:`OuterWeights`.

    Attributes:
        inner: the inner batch.
        outer: the outer batch.
        number: of the step within its run, from 0.

    >>> WeighedBatch("support", "query", number=0).inner
    'support'
    """

    inner: Batch
    outer: Batch
    number: int


@dataclass(frozen=True)
class InnerState:
    """Everything an inner step reads and writes.

    Attributes:
        params: θ, keyed by parameter name; what is carried over from before lacks the shared ones.
        buffers: module buffers such as BatchNorm statistics, keyed by buffer name; never differentiated.
        opt_state: state of the inner optimizer; empty before the first step.
        steps: inner steps taken so far.
        total: Σ_t w_t f(θ_t, φ) of the run so far, where the outer loss is weighed at every step; ``None`` before.

    >>> state = InnerState({"w": torch.ones(1)}, opt_state={"momentum": {"w": torch.zeros(1)}}, steps=3)
    >>> state.unflat({"w": torch.zeros(1), "momentum:w": torch.ones(1)})
    InnerState(params={'w': tensor([0.])}, buffers={}, opt_state={'momentum': {'w': tensor([1.])}}, steps=3, total=None)
    """

    params: Params
    buffers: Params = field(default_factory=dict)
    opt_state: OptState = field(default_factory=dict)
    steps: int = 0
    total: Tensor | None = None

    def flat(self) -> Params:
        """Return θ, the optimizer state and the total, all that is differentiated, as one tree.

        >>> InnerState({"w": torch.ones(1)}, opt_state={"momentum": {"w": torch.zeros(1)}}).flat()
        {'w': tensor([1.]), 'momentum:w': tensor([0.])}
        """
        slots = {f"{slot}:{name}": value for slot, values in self.opt_state.items() for name, value in values.items()}
        return {**self.params, **slots, **({} if self.total is None else {TOTAL: self.total})}

    def unflat(self, flat: Params) -> InnerState:
        """Return this state with the tensors of ``flat``, as :meth:`flat` names them."""
        params = {name: flat[name] for name in self.params}
        opt_state = {slot: {k: flat[f"{slot}:{k}"] for k in values} for slot, values in self.opt_state.items()}
        return replace(self, params=params, opt_state=opt_state, total=flat.get(TOTAL))

    def detach(self) -> InnerState:
        """Cut all that is differentiated off its graph."""
        return self.unflat(tree.detach(self.flat()))

    def map(self, fn: Callable[[Tensor], Tensor]) -> InnerState:
        """Apply ``fn`` to every tensor; a total, which ends with its run, is left out."""
        opt_state = {slot: tree.map(fn, values) for slot, values in self.opt_state.items()}
        return InnerState(tree.map(fn, self.params), tree.map(fn, self.buffers), opt_state, self.steps)

    @staticmethod
    def stack(states: Sequence[InnerState]) -> InnerState:
        """Stack the states of several episodes along a new first dimension.

        >>> InnerState.stack([InnerState({"w": torch.tensor(1.0)}), InnerState({"w": torch.tensor(2.0)})]).params
        {'w': tensor([1., 2.])}
        """
        return _joined(states, torch.stack)

    @staticmethod
    def cat(states: Sequence[InnerState]) -> InnerState:
        """Join stacked states along their first dimension."""
        return _joined(states, torch.cat)


TOTAL = ":total"
"""Name of :attr:`InnerState.total` in :meth:`InnerState.flat`; no parameter and no slot is called so."""


def _joined(states: Sequence[InnerState], join: Callable[[list[Tensor]], Tensor]) -> InnerState:
    def joined(trees: Sequence[Params]) -> Params:
        return {name: join([values[name] for values in trees]) for name in trees[0]}

    first = states[0]
    return InnerState(
        joined([state.params for state in states]),
        joined([state.buffers for state in states]),
        {slot: joined([state.opt_state[slot] for state in states]) for slot in first.opt_state},
        first.steps,
    )


class Carry(NamedTuple):
    """What goes on from one outer step to the next: a value, which an estimate takes and returns.

    Attributes:
        inner: the inner level's; stacked, ``(episodes, *shape)``, where an estimate is that of several episodes.
        strategy: the hypergradient strategy's own, a tree by name; empty at first.

    >>> carry = Carry(InnerState({"w": torch.ones(1)}), {"guide/d": {"p": torch.zeros(1)}})
    >>> carry.of("guide").strategy
    {'d': {'p': tensor([0.])}}
    """

    inner: InnerState
    strategy: dict[str, Params] = {}  # noqa: RUF012  # nobody writes to it

    def of(self, member: str) -> Carry:
        """Return what belongs to a member of a strategy that is made of several."""
        prefix = f"{member}/"
        own = {name.removeprefix(prefix): kept for name, kept in self.strategy.items() if name.startswith(prefix)}
        return Carry(self.inner, own)


class Hypergradient(NamedTuple):
    """An estimate of ∇h(φ).

    Attributes:
        value: h(φ), the outer loss at θ_T, a 0-dim tensor.
        grads: the estimate, keyed by outer parameter name, shaped as the parameters.
        state: the inner state after the last step; ``state.params`` is θ_T.
        metrics: 0-dim tensors to log, such as ``inner_loss`` of the last inner step.
        kept: what the strategy carries to the next estimate.
        observed: what the losses had left behind at θ_T, see :class:`Observer`.
        known: directions along which the estimate is exact, by name: orthonormal; of several episodes, their means.
        explicit: the part of the estimate that is exact whatever the direction; empty where there is none.

    >>> estimate = Hypergradient(torch.tensor(2.0), {"w": torch.ones(1)}, InnerState({"v": torch.zeros(1)}), {})
    >>> estimate.grads["w"], estimate.carry.inner.params
    (tensor([1.]), {'v': tensor([0.])})
    """

    value: Tensor
    grads: Params
    state: InnerState
    metrics: dict[str, Tensor]
    kept: dict[str, Params] = {}  # noqa: RUF012  # nobody writes to it
    observed: Any = None
    known: dict[str, Params] = {}  # noqa: RUF012
    explicit: Params = {}  # noqa: RUF012

    @property
    def carry(self) -> Carry:
        """What the next estimate goes on from: ``hypergradient(..., carry=result.carry)``."""
        return Carry(self.state, self.kept)

    def divided(self, count: int) -> Hypergradient:
        """Return the mean over ``count`` stacked episodes, whose losses are summed."""
        if count == 1:
            return self
        metrics = {name: v / count if name == "inner_loss" else v for name, v in self.metrics.items()}
        grads, explicit = (tree.scale(each, 1 / count) for each in (self.grads, self.explicit))
        return self._replace(value=self.value / count, grads=grads, metrics=metrics, explicit=explicit)


class Observer(Protocol):
    """Watches what evaluations of the losses leave behind besides their values: logs, metrics, buffers.

    An estimate evaluates losses many times; what it returns as :attr:`Hypergradient.observed` is what counts.
    """

    def begin(self) -> None:
        """Begin the estimate of one stack of episodes."""

    def observe(self) -> Any:
        """Return what has been left behind so far; called after an evaluation of the outer loss."""

    def end(self, observed: Any, count: int) -> Params:
        """End the estimate of ``count`` episodes, of which ``observed`` counts; return the buffers it left."""


Slopes = tuple[Tensor, Params, Params]
"""The value of a loss, and its gradients by θ and by φ, all detached."""


class CompiledLosses(Protocol):
    """Evaluates losses at a state by graphs, see :class:`lightning_bilevel.compiled.CompiledLosses`.

    Each function returns ``None`` where the loss has to be evaluated operation by operation.
    """

    def outer_value(self, problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch) -> Tensor | None:
        """Return f."""

    def outer_slopes(self, problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch) -> Slopes | None:
        """Return f, ∂f/∂θ and ∂f/∂φ."""

    def inner_slopes(
        self, problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch, by_theta: bool
    ) -> Slopes | None:
        """Return g, ∂g/∂θ where ``by_theta``, and ∂g/∂φ."""


class Compiler(Protocol):
    """Makes compiled inner steps and losses, see :class:`lightning_bilevel.compiled.Compiler`."""

    @property
    def losses(self) -> CompiledLosses:
        """Evaluates the losses outside of steps."""

    def compiled(self, step: Any) -> Any:
        """Return a step in place of one that is computed operation by operation, with the same functions."""


class Traits(NamedTuple):
    """What is known of a problem beyond its functions; read by the refusals of strategies only.

    Attributes:
        warm: whether θ and the optimizer's state continue from one outer step to the next.
        proximal: λ of the term λ/2 ‖θ − φ‖² in the inner loss, see :func:`with_proximal`.
        learned: returns the outer parameters that the inner optimizer's updates read, other than as a decay that is in
            :attr:`BilevelProblem.penalty`: a learned learning rate, say.
        rates: returns those of them that only say how a fixed point of the updates is reached, as far as is known.
        unstationary: names the inner optimizer if its fixed points are known not to be the stationary points that
            :meth:`BilevelProblem.stationary` has.
        stateful: returns whether the inner optimizer has state besides θ.
        differentiable_solve: whether autograd may go through ``solver``.
    """

    warm: bool = False
    proximal: float = 0.0
    learned: Callable[[], frozenset[str]] = frozenset
    rates: Callable[[], frozenset[str]] = frozenset
    unstationary: Callable[[], str] = str
    stateful: Callable[[], bool] = bool
    differentiable_solve: bool = True


@dataclass(frozen=True)
class BilevelProblem:
    """A bilevel problem as pure functions; what every hypergradient strategy is written against.

    Any other problem is ``replace(problem, inner_loss=...)``: steps are made from these functions when they are taken.

    Attributes:
        inner_loss: g, see :data:`InnerLoss`.
        outer_loss: f, see :data:`OuterLoss`.
        initial: Ω_0, see :data:`Initial`.
        initial_from: Ω_0 where it depends on the episode, see :data:`InitialFrom`; :meth:`on` makes ``initial`` of it.
        init_opt_state: the inner optimizer's first state, see :data:`InitOptState`.
        update: the inner optimizer's step, see :data:`Update`.
        inner_steps: T, the number of inner steps.
        shared: names that are in θ and in φ: there θ_0 = φ.
        solver: the user's own inner solver, see :data:`Solver`, or ``None`` for the gradient loop.
        outer_loss_weights: those of the outer loss at every inner step, see :data:`OuterWeights`; ``None``: h is f at
            θ_T alone.
        penalty: what ``update`` decreases besides g, see :data:`Penalty`; ``None``: nothing.
        maximize: whether ``update`` ascends.
        elementwise: whether ``update`` treats every entry of θ alike, so that stacked θ can pass as one.
        max_copies: copies of θ that one vectorized call should hold at most; 1 where loops are faster.
        traits: see :class:`Traits`.
        observer: watches what evaluations of the losses leave behind.
        findings: what was found out about these losses once, so that later estimates need not try again.
        compiler: makes compiled inner steps and losses; ``None``: all is computed operation by operation.
        stacked: episodes that a batch is stacked of; 0: it is that of one.

    That of a module is ``module.functional().problem``. One by hand, with gradient descent at the rate 0.5:

    >>> from lightning_bilevel.calculus import inner_step
    >>> problem = BilevelProblem(
    ...     inner_loss=lambda theta, phi, batch, buffers: ((theta["w"] - phi["p"] * batch).square() / 2, buffers),
    ...     outer_loss=lambda theta, phi, batch, buffers: (theta["w"] - batch).square() / 2,
    ...     update=lambda theta, grads, opt_state, phi, step: ({"w": theta["w"] - 0.5 * grads["w"]}, opt_state),
    ...     inner_steps=1,
    ... )
    >>> phi = {"p": torch.tensor(2.0)}
    >>> state = problem.start(InnerState({"w": torch.tensor(0.0)}), phi)
    >>> state, loss = inner_step(problem)(state, phi, torch.tensor(1.0))
    >>> state.params, loss
    ({'w': tensor(1.)}, tensor(2.))
    """

    inner_loss: InnerLoss
    outer_loss: OuterLoss
    update: Update
    inner_steps: int
    initial: Initial = lambda carried, phi: carried  # noqa: E731
    initial_from: InitialFrom | None = None
    init_opt_state: InitOptState = lambda theta, phi: {}  # noqa: E731
    shared: frozenset[str] = frozenset()
    solver: Solver | None = None
    outer_loss_weights: OuterWeights | None = None
    penalty: Penalty | None = None
    maximize: bool = False
    elementwise: bool = False
    max_copies: int = 2**30
    traits: Traits = Traits()
    observer: Observer | None = None
    findings: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    compiler: Compiler | None = None
    stacked: int = 0

    def on(self, episode: Episode) -> BilevelProblem:
        """Return the problem whose runs start as those of ``episode`` do; what a strategy is given.

        >>> problem = BilevelProblem(
        ...     inner_loss=lambda theta, phi, batch, buffers: (theta["w"] - batch, buffers),
        ...     outer_loss=lambda theta, phi, batch, buffers: theta["w"],
        ...     update=lambda theta, grads, opt_state, phi, step: (theta, opt_state),
        ...     inner_steps=1,
        ...     initial_from=lambda carried, phi, batches: {"w": phi["p"] * batches[0]},
        ... )
        >>> problem = problem.on(Episode([torch.tensor(3.0)], None))
        >>> problem.start(InnerState({}), {"p": torch.tensor(2.0)}).params
        {'w': tensor(6.)}
        """
        if (initial_from := self.initial_from) is None:
            return self
        batches = list(episode.inner)
        return replace(self, initial=lambda carried, phi: initial_from(carried, phi, batches), initial_from=None)

    def batches(self, episode: Episode) -> list[Batch]:
        """Return the batch of every step: T inner batches, cycled. A user's solver is one step, with all of them."""
        if self.solver is not None:
            return [list(episode.inner)]
        batches = [episode.inner[t % len(episode.inner)] for t in range(self.inner_steps)]
        if self.outer_loss_weights is None:
            return batches
        return [WeighedBatch(batch, episode.outer, number) for number, batch in enumerate(batches)]

    def judged_at_the_end(self) -> BilevelProblem:
        """Return the problem whose outer loss is f at θ_T alone."""
        return self if self.outer_loss_weights is None else replace(self, outer_loss_weights=None)

    def weighed(self, weights: Tensor, number: int) -> Tensor:
        """Return w_t of the step with this number, from 0. Fewer steps than T, a rehearsal, have the last weights."""
        return weights[..., number - self.inner_steps]

    def start(self, carried: InnerState, phi: Params) -> InnerState:
        """Return the state before the first step: θ_0 = Ω_0(φ) and the optimizer's state, differentiable in φ."""
        params = self.initial(carried.params, phi)
        fresh = self.init_opt_state(params, phi)
        opt_state = {slot: {**values, **carried.opt_state.get(slot, {})} for slot, values in fresh.items()}
        return replace(carried, params=params, opt_state=opt_state, total=None)

    def stationary(self) -> BilevelProblem:
        """Return the problem whose inner loss is stationary where the inner optimizer stays: g or −g, and the penalty.

        The fixed points of descent with a weight decay λ are the stationary points of g + λ/2 ‖θ‖², those of ascent are
        those of −g + λ/2 ‖θ‖². What implicit differentiation takes derivatives of is this loss; its update is not to be
        used, for it would count the penalty twice.

        >>> problem = BilevelProblem(
        ...     inner_loss=lambda theta, phi, batch, buffers: ((theta["w"] - phi["p"]).square() / 2, buffers),
        ...     outer_loss=lambda theta, phi, batch, buffers: theta["w"],
        ...     update=lambda theta, grads, opt_state, phi, step: ({"w": 0.9 * theta["w"] + grads["w"]}, opt_state),
        ...     inner_steps=1,
        ...     penalty=lambda theta, phi: 0.1 * theta["w"].square() / 2,
        ...     maximize=True,
        ... )
        >>> problem.stationary().inner_loss({"w": torch.tensor(1.0)}, {"p": torch.tensor(3.0)}, None, {})[0]
        tensor(-1.9500)
        """
        if self.penalty is None and not self.maximize:
            return self
        problem = self

        def inner_loss(theta: Params, phi: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
            loss, buffers = problem.inner_loss(theta, phi, batch, buffers)
            if problem.maximize:
                loss = -loss
            return loss if problem.penalty is None else loss + problem.penalty(theta, phi), buffers

        return replace(self, inner_loss=inner_loss, penalty=None, maximize=False)

    def vmapped(self, count: int, over: Literal["episodes", "phi"]) -> BilevelProblem:
        """Return the problem of ``count`` copies at once, again a bilevel problem.

        θ, optimizer state and buffers gain a leading dimension of size ``count``, and so do

        - batches, over ``"episodes"``; random masks differ. Both losses are the *sum* over episodes, so that the
          hypergradient is the sum of theirs, see :meth:`Hypergradient.divided`.
        - outer parameters, over ``"phi"``; random masks are the same. The inner loss is the sum, the outer loss a
          vector of shape ``(count,)``.
        """
        each_phi = over == "phi"
        of_phi = 0 if each_phi else None

        def vectorize(loss: Callable[..., Any]) -> Callable[[Params, Params, Batch, Params], Any]:
            def of_phis(theta: Params, phi: Params, batch: Batch, buffers: Params) -> Any:
                one = lambda theta, phi, buffers: loss(theta, phi, batch, buffers)  # noqa: E731
                with unfused():
                    return vectorized(one, theta, phi, buffers, randomness="same")

            def of_episodes(theta: Params, phi: Params, batch: Batch, buffers: Params) -> Any:
                one = lambda theta, batch, buffers: loss(theta, phi, batch, buffers)  # noqa: E731
                with unfused():  # which has no rule for vmap on a CPU, and elsewhere draws masks of its own
                    return vectorized(one, theta, batch, buffers, randomness="different")

            return of_phis if each_phi else of_episodes

        inner_losses, outer_losses = vectorize(self.inner_loss), vectorize(self.outer_loss)

        def inner_loss(theta: Params, phi: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
            losses, buffers = inner_losses(theta, phi, batch, buffers)
            return losses.sum(), buffers

        def outer_loss(theta: Params, phi: Params, batch: Batch, buffers: Params) -> Tensor:
            losses: Tensor = outer_losses(theta, phi, batch, buffers)
            return losses if each_phi else losses.sum()

        def initial(carried: Params, phi: Params) -> Params:
            if each_phi:
                return vmap(self.initial)(carried, phi)
            if carried:
                return vmap(self.initial, in_dims=(0, None), randomness="different")(carried, phi)
            # All is shared: the starts are equal, unless the user's hook draws.
            device = tree.device(phi)
            before = RngState(device)
            start = self.initial(carried, phi)
            if before.untouched():
                return tree.expand(start, count)
            before.restore()
            each = torch.empty(count, device=device)
            return vmap(lambda _: self.initial(carried, phi), randomness="different")(each)

        def initial_from(carried: Params, phi: Params, batches: Sequence[Batch]) -> Params:
            one_from = self.initial_from
            assert one_from is not None
            if each_phi:
                return vmap(lambda own, outer: one_from(own, outer, batches))(carried, phi)
            one = lambda carried, batches: one_from(carried, phi, batches)  # noqa: E731
            return vectorized(one, carried, batches, randomness="different")

        def update(
            params: Params, grads: Params, opt_state: OptState, phi: Params, step: int
        ) -> tuple[Params, OptState]:
            one = lambda p, g, s, outer: self.update(p, g, s, outer, step)  # noqa: E731
            return vmap(one, in_dims=(0, 0, 0, of_phi))(params, grads, opt_state, phi)

        def penalty(theta: Params, phi: Params) -> Tensor:
            assert self.penalty is not None
            return vmap(self.penalty, in_dims=(0, of_phi))(theta, phi).sum()

        as_one, weights = self.elementwise and not each_phi, self.outer_loss_weights
        return replace(
            self,
            inner_loss=inner_loss,
            outer_loss=outer_loss,
            initial=initial,
            initial_from=None if self.initial_from is None else initial_from,
            init_opt_state=self.init_opt_state if as_one else vmap(self.init_opt_state, in_dims=(0, of_phi)),
            update=self.update if as_one else update,
            outer_loss_weights=vmap(weights) if weights is not None and each_phi else weights,
            penalty=None if self.penalty is None else penalty,
            max_copies=max(1, self.max_copies // count),
            stacked=self.stacked if each_phi else count,
        )


def with_proximal(problem: BilevelProblem, weight: float) -> BilevelProblem:
    """Return the problem with weight/2 ‖θ − φ‖² over the shared parameters added to its inner loss (iMAML).

    >>> from lightning_bilevel.testing import Initialization
    >>> (plain, phi, _), batch = Initialization().plain(), torch.zeros(1, 4)
    >>> theta = {"theta": phi["theta"] + 1}
    >>> near, far = (each.inner_loss(theta, phi, batch, {})[0] for each in (plain, with_proximal(plain, 3.0)))
    >>> round((far - near).item(), 6)  # 3/2 · 4
    6.0
    """

    def inner_loss(theta: Params, phi: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
        loss, buffers = problem.inner_loss(theta, phi, batch, buffers)
        for name in problem.shared:
            loss = loss + 0.5 * weight * (theta[name] - phi[name]).square().sum()
        return loss, buffers

    return replace(problem, inner_loss=inner_loss, traits=problem.traits._replace(proximal=weight))


def stackable(a: Episode, b: Episode) -> bool:
    """Return whether two episodes can be stacked: see :func:`~lightning_bilevel.stacking.alike`."""
    return alike(list(a.inner), list(b.inner)) and alike(a.outer, b.outer)


def stack_episodes(episodes: Sequence[Episode]) -> Episode:
    """Stack the tensors of :func:`stackable` episodes along a new first dimension."""
    return Episode(stacked([list(episode.inner) for episode in episodes]), stacked([e.outer for e in episodes]))
