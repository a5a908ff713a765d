"""The inner step Ω_t as an object: what it does to a state, and its derivatives. No other place differentiates Ω.

With A_t = ∂Ω_t/∂θ_{t-1} and B_t = ∂Ω_t/∂φ, where θ stands for parameters and optimizer state together:

- calling it takes the step, ``run`` takes a stretch of steps;
- ``graph`` takes a stretch of steps and leaves their graph to autograd;
- ``vjp`` takes a stretch of steps and returns d ↦ (d A, d B) of the stretch;
- ``held`` is the same with A = I and B = 0, as in first-order MAML;
- ``jvp`` takes a step and pushes tangents, z ↦ A_t z + B_t v, ``push`` through a stretch of steps;
- ``whole`` takes a stretch of steps with the outer loss at its end and the gradient of that, where that is one graph;
- ``rule`` takes a step and differentiates what the optimizer makes of the inner gradient, but not that gradient;
- ``products`` are those with ∂²g/∂θ² and ∂²g/∂θ∂φ;
- ``stationarity`` and ``fixed_point`` are conditions r = 0 for the end of a run, ∇g = 0 and Ω(s) = s, with products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.tangents import Pushed
from lightning_bilevel.kernels.inner_gradient import inner_gradient
from lightning_bilevel.linear_solvers.base import Series
from lightning_bilevel.problem import Batch, BilevelProblem, InnerState
from lightning_bilevel.tree import Params

Product = Callable[[Params], Params]
Pullback = Callable[[Params, Collection[str]], tuple[Params, Params]]
"""(d, names of the start's tensors that are wanted) to (d A for these names, d B); frees the graph and empties d.

d and d A are named as :meth:`InnerState.flat`; what d lacks is zero.
"""


class Pulled(NamedTuple):
    """A stretch of steps that can be run backward.

    Attributes:
        state: its end, detached.
        losses: the inner losses at the start of each step.
        pull: see :data:`Pullback`.

    On g = ½ θᵀAθ − θᵀb with rate 0.2, A_t = I − 0.2 A:

    >>> from lightning_bilevel.calculus import inner_step
    >>> from lightning_bilevel.testing import Quadratic
    >>> module = Quadratic()
    >>> (problem, phi, carry), episode = module.plain(), module.episode()
    >>> pulled = inner_step(problem).vjp(carry.inner, phi, problem.batches(episode))
    >>> v, eye = torch.ones(4, dtype=torch.float64), torch.eye(4)
    >>> d, through = pulled.pull({"theta": v}, ["theta"])
    >>> torch.allclose(d["theta"], v @ torch.linalg.matrix_power(eye - 0.2 * module.A, 3))
    True
    """

    state: InnerState
    losses: list[Tensor]
    pull: Pullback


class Whole(NamedTuple):
    """A stretch of steps with the outer loss at its end, and its gradient through the steps; all detached.

    Attributes:
        state: its end.
        losses: the inner losses at the start of each step.
        value: f; where it is weighed, its values in a row, of whose weighed sum the gradients are.
        d: df/ds by the state s that it starts from, named as :meth:`InnerState.flat`, but for what is tied to φ.
        c: df/dφ at that state, and through what is tied to φ.
        observed: what the outer loss left behind, see :class:`~lightning_bilevel.problem.Observer`.

    >>> one = torch.ones(1)
    >>> Whole(InnerState({"w": one}), [one], one, {"w": one}, {"p": one}, None).c
    {'p': tensor([1.])}
    """

    state: InnerState
    losses: list[Tensor]
    value: Tensor
    d: Params
    c: Params
    observed: Any


class Ruled(NamedTuple):
    """A step θ ↦ U(θ, ∇g, φ) whose inner gradient is taken as given; all detached.

    Attributes:
        state: its end.
        loss: the inner loss at its start.
        pull: d ↦ (d ∂U/∂(∇g), d ∂U/∂θ, d ∂U/∂φ), once.

    Of gradient descent with rate 0.2 those are −0.2 d, d and 0:

    >>> from lightning_bilevel.calculus import inner_step
    >>> from lightning_bilevel.testing import Quadratic
    >>> module = Quadratic()
    >>> (problem, phi, carry), episode = module.plain(), module.episode()
    >>> ruled = inner_step(problem).rule(carry.inner, phi, episode.inner[0])
    >>> u, d, through = ruled.pull({"theta": torch.ones(4, dtype=torch.float64)})
    >>> [float(each.sum()) for each in (u["theta"], d["theta"], through["target"])]
    [-0.8, 4.0, 0.0]
    """

    state: InnerState
    loss: Tensor
    pull: Callable[[Params], tuple[Params, Params, Params]]


class Condition(NamedTuple):
    """r(s, φ) = 0, which defines s as a function of φ, at some s that nearly satisfies it; both products on one graph.

    With d = ∂f/∂s and (∂r/∂s)ᵀ x = d, df/dφ = ∂f/∂φ − x ∂r/∂φ where r is 0. Memory: the graph of r lives as long as the
    functions do.

    Attributes:
        residual: r, detached.
        transposed: v ↦ (∂r/∂s)ᵀ v.
        mixed: v ↦ v ∂r/∂φ.
        series: terms of the Neumann series of ``transposed``, where they are to be had at once.
    """

    residual: Params
    transposed: Product
    mixed: Product
    series: Series | None = None


class InnerStep(ABC):
    """(θ, optimizer state) ↦ Ω_t, and its derivatives.

    Args:
        problem: whose functions the step is made of. That of a stacked problem is the step of the stack.

    Attributes:
        problem: as given.

    On g = ½ θᵀAθ − θᵀ(Bφ + x):

    >>> from lightning_bilevel.calculus import inner_step
    >>> from lightning_bilevel.testing import Quadratic
    >>> module = Quadratic()
    >>> (problem, phi, carry), episode = module.plain(), module.episode()
    >>> hessian, mixed = inner_step(problem).products(carry.inner, phi, episode.inner[0])
    >>> v = torch.ones(4, dtype=torch.float64)
    >>> torch.allclose(hessian({"theta": v})["theta"], module.A @ v)
    True
    >>> torch.allclose(mixed({"theta": v})["target"], -v @ module.B)
    True
    """

    def __init__(self, problem: BilevelProblem) -> None:
        self.problem = problem

    @abstractmethod
    def __call__(self, state: InnerState, phi: Params, batch: Batch) -> tuple[InnerState, Tensor | None]:
        """Return the state after one step, and the inner loss before it, both without a graph."""

    def run(self, state: InnerState, phi: Params, batches: Sequence[Batch]) -> tuple[InnerState, list[Tensor]]:
        """Take one step per batch; return the end, and the inner losses at the start of each step, without a graph."""
        losses: list[Tensor] = []
        for batch in batches:
            state, loss = self(state, phi, batch)
            append_loss(losses, loss)
        return state, losses

    @abstractmethod
    def graph(self, state: InnerState, phi: Params, batches: Sequence[Batch]) -> tuple[InnerState, list[Tensor]]:
        """Take one step per batch; what comes back hangs on the graphs of ``state`` and ``phi``.

        Memory: the activations of a step, ``len(batches)`` times.

        Returns:
            The end, and the inner losses at the start of each step, detached.
        """

    def vjp(self, state: InnerState, phi: Params, batches: Sequence[Batch]) -> Pulled:
        """Take one step per batch, with one graph for all of them, that can be run backward; see :meth:`graph`."""
        begin, outer = tree.leaves(state.flat()), tree.leaves(phi)
        end, losses = self.graph(state.unflat(begin), outer, batches)
        return Pulled(end.detach(), losses, pullback(end.flat(), begin, outer))

    def held(self, state: InnerState, phi: Params, batches: Sequence[Batch]) -> Pulled:
        """Take one step per batch that counts as the identity, A = I and B = 0: no graph of any."""
        state, losses = self.run(state, phi, batches)

        def pull(cotangent: Params, wanted: Collection[str]) -> tuple[Params, Params]:
            return {name: value for name, value in cotangent.items() if name in wanted}, tree.zeros_like(phi)

        return Pulled(state, losses, pull)

    @abstractmethod
    def jvp(self, state: InnerState, phi: Params, batch: Batch, tangents: Params, directions: Params) -> Pushed:
        """Take one step and push tangents through it.

        Args:
            state: before the step; its trees, and ``tangents``, may be emptied on the way.
            phi: outer parameters.
            batch: the inner batch.
            tangents: Z v_i, stacked: ``(n, *shape)`` for every tensor of ``state.flat()``.
            directions: v_i, stacked: ``(n, *shape)`` per outer parameter.

        Returns:
            The state after the step, the inner loss, and A Z v_i + B v_i.
        """

    def push(
        self, state: InnerState, phi: Params, batches: Sequence[Batch], tangents: Params, directions: Params
    ) -> tuple[InnerState, list[Tensor], Params]:
        """Take one step per batch and push tangents through all; see :meth:`jvp`."""
        losses: list[Tensor] = []
        for batch in batches:
            state, loss, tangents = self.jvp(state, phi, batch, tangents, directions)
            append_loss(losses, loss)
        return state, losses, tangents

    def whole(
        self,
        state: InnerState,
        phi: Params,
        batches: Sequence[Batch],
        outer: Batch,
        tied: Collection[str] = (),
        weights: Mapping[int, Tensor] | None = None,
    ) -> Whole | None:
        """Take one step per batch, evaluate the outer loss, and differentiate it.

        Args:
            state: before the first step.
            phi: outer parameters.
            batches: the inner batches.
            outer: the outer batch.
            tied: names of inner parameters that start as φ, see :func:`tied_to`.
            weights: by the number of steps after which the outer loss is evaluated, the last of them the end, those
                of the sum that is differentiated; its terms are returned. ``None``: it is evaluated at the end.

        Returns:
            ``None`` where that is not one graph, and nothing is done.
        """
        return None

    @abstractmethod
    def fixed_point(self, state: InnerState, phi: Params, batch: Batch) -> Condition:
        """Return r = s − Ω(s, φ) at s = ``state.flat()``, parameters and optimizer state: ∂r/∂s = I − A, ∂r/∂φ = −B.

        Each product is one backward pass over the graph of a step.
        """

    def stationarity(self, state: InnerState, phi: Params, batch: Batch) -> Condition:
        """Return r = ∇_θ g at θ = ``state.params``: ∂r/∂θ = ∂²g/∂θ², symmetric, and ∂r/∂φ = ∂²g/∂θ∂φ.

        Each product is one backward pass over the graph of the inner gradient.
        """
        theta, outer = tree.leaves(state.params), tree.leaves(phi)
        with torch.enable_grad():
            loss, _ = self.problem.inner_loss(theta, outer, batch, state.buffers)
            with inner_gradient():
                gradient = tree.grad(loss, theta, create_graph=True)
        return condition(gradient, theta, outer)

    def rule(self, state: InnerState, phi: Params, batch: Batch) -> Ruled:
        """Take the step; see :class:`Ruled`. No second derivatives of the inner loss."""
        theta, outer = tree.leaves(state.params), tree.leaves(phi)
        with torch.enable_grad():
            loss, buffers = self.problem.inner_loss(theta, phi, batch, state.buffers)
            with inner_gradient():
                gradient = tree.leaves(tree.grad(loss, theta))
            begin = tree.leaves(state.params)
            params, opt_state = self.problem.update(begin, gradient, state.opt_state, outer, state.steps + 1)
        after = InnerState(params, buffers, opt_state, state.steps + 1).detach()

        def pull(d: Params) -> tuple[Params, Params, Params]:
            pairs = [(value, d[name]) for name, value in params.items() if value.requires_grad]
            trees = (gradient, begin, outer)
            leaves = [leaf for each in trees for leaf in each.values()]
            ends, vectors = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(ends, leaves, vectors, allow_unused=True))
            first, second, third = (tree.like(each, [next(found) for _ in each]) for each in trees)
            return first, second, third

        return Ruled(after, loss.detach(), pull)

    def products(self, state: InnerState, phi: Params, batch: Batch) -> tuple[Product, Product]:
        """Return v ↦ ∂²g/∂θ² v and v ↦ v ∂²g/∂θ∂φ at ``state``, those of :meth:`stationarity`."""
        condition = self.stationarity(state, phi, batch)
        return condition.transposed, condition.mixed


def tied_to(phi: Params, start: Params) -> list[str]:
    """Return the names of tensors in a start that are the very ones in φ, or repeat these for each of several episodes.

    >>> phi = {"w": torch.ones(2), "v": torch.ones(2)}
    >>> tied_to(phi, {"w": phi["w"].expand(3, 2), "v": 2 * phi["v"], "u": torch.ones(2)})
    ['w']
    """
    return [name for name, value in start.items() if name in phi and (value is phi[name] or _repeats(value, phi[name]))]


def _repeats(value: Tensor, one: Tensor) -> bool:
    same_place = value._base is one and value.storage_offset() == one.storage_offset()
    return same_place and value.shape[1:] == one.shape and value.stride() == (0, *one.stride())


def pullback(end: Params, begin: Params, outer: Params) -> Pullback:
    """Return the pullback of a graph that leads from the leaves ``begin`` and ``outer`` to ``end``."""

    def pull(cotangent: Params, wanted: Collection[str]) -> tuple[Params, Params]:
        inputs = {name: begin[name] for name in begin if name in wanted}
        pairs = [(end.pop(name), cotangent.pop(name)) for name in list(cotangent) if end[name].requires_grad]
        end.clear()
        if not pairs:
            return tree.zeros_like(inputs), tree.zeros_like(outer)
        outputs, vectors = zip(*pairs, strict=True)
        leaves = [*inputs.values(), *outer.values()]
        values = torch.autograd.grad(outputs, leaves, vectors, allow_unused=True)
        return tree.like(inputs, values[: len(inputs)]), tree.like(outer, values[len(inputs) :])

    return pull


def condition(residual: Params, begin: Params, outer: Params) -> Condition:
    """Return the condition of a residual with a graph that leads back to the leaves ``begin`` and ``outer``."""

    def product(vector: Params, inputs: Params) -> Params:
        pairs = [(value, vector[name]) for name, value in residual.items() if value.requires_grad]
        if not pairs:
            return tree.zeros_like(inputs)
        outputs, vectors = zip(*pairs, strict=True)
        values = torch.autograd.grad(outputs, list(inputs.values()), vectors, retain_graph=True, allow_unused=True)
        return tree.like(inputs, values)

    return Condition(tree.detach(residual), lambda v: product(v, begin), lambda v: product(v, outer))


_JOINED_AT = 100


def append_loss(losses: list[Tensor], *more: Tensor | None) -> None:
    """Append losses, each one or several that were joined, to those of a run; ``None`` is left out.

    Every 100 losses are concatenated: a 0-dim tensor costs about 1 kB of Python objects.

    >>> losses = []
    >>> append_loss(losses, torch.tensor(2.0), torch.tensor([3.0, 4.0]))
    >>> losses
    [tensor([2.]), tensor([3., 4.])]
    """
    for loss in more:
        if loss is not None:
            losses.append(loss if loss.ndim else loss.reshape(1))
        if len(losses) == _JOINED_AT:
            losses[:] = [torch.cat(losses)]
