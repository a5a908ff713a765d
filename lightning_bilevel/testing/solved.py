"""What the problems of this wing have in common: the same problem as a module, as pure functions, as a plain loop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_bilevel.data.numbered import Place, PlacedBatches
from lightning_bilevel.errors import value_error
from lightning_bilevel.inner_optimizers import SGD, Adam, InnerOptimizer
from lightning_bilevel.inner_optimizers.base import OptState
from lightning_bilevel.problem import Batch, BilevelProblem, Carry, Episode, InnerState, Traits, with_proximal
from lightning_bilevel.randomness import Key, RngState
from lightning_bilevel.training.module import BilevelModule
from lightning_bilevel.tree import Params

Moved = tuple[Tensor, tuple[Tensor, ...]]
Rate = float | Tensor


class Rule(NamedTuple):
    """An inner optimizer, twice.

    Attributes:
        optimizer: makes this package's from a learning rate.
        slots: names of its state.
        move: (θ, gradient, state, rate, number of the step from 1) to the next θ and state, of one tensor, in plain
            PyTorch.
    """

    optimizer: Callable[[Any], InnerOptimizer]
    slots: tuple[str, ...]
    move: Callable[[Tensor, Tensor, tuple[Tensor, ...], Rate, int], Moved]

    def update(self, theta: Params, grads: Params, state: OptState, rate: Rate, step: int) -> tuple[Params, OptState]:
        """Return the next θ and state of all tensors."""
        params: Params = {}
        slots: OptState = {slot: {} for slot in self.slots}
        for name, value in theta.items():
            before = tuple(state[slot][name] for slot in self.slots)
            params[name], after = self.move(value, grads[name], before, rate, step)
            for slot, tensor in zip(self.slots, after, strict=True):
                slots[slot][name] = tensor
        return params, slots

    def init(self, theta: Params) -> OptState:
        """Return the state before the first step: zeros."""
        return {slot: {name: torch.zeros_like(value) for name, value in theta.items()} for slot in self.slots}


def _descent(theta: Tensor, grad: Tensor, state: tuple[Tensor, ...], rate: Rate, step: int) -> Moved:
    return theta - rate * grad, ()


def _momentum(theta: Tensor, grad: Tensor, state: tuple[Tensor, ...], rate: Rate, step: int) -> Moved:
    (velocity,) = state
    velocity = MOMENTUM * velocity + grad
    return theta - rate * velocity, (velocity,)


def _adam(theta: Tensor, grad: Tensor, state: tuple[Tensor, ...], rate: Rate, step: int) -> Moved:
    mean, square = state
    (first, second), eps = BETAS, EPS
    mean = first * mean + (1 - first) * grad
    square = second * square + (1 - second) * grad * grad
    scale = (square / (1 - second**step)).sqrt() + eps
    return theta - rate * (mean / (1 - first**step)) / scale, (mean, square)


MOMENTUM = 0.6
BETAS, EPS = (0.7, 0.9), 0.01

RULES: dict[str, Rule] = {
    "SGD": Rule(lambda lr: SGD(lr), (), _descent),
    "momentum": Rule(lambda lr: SGD(lr, momentum=MOMENTUM), ("momentum",), _momentum),
    "Adam": Rule(lambda lr: Adam(lr, BETAS, EPS), ("exp_avg", "exp_avg_sq"), _adam),
}
"""The inner optimizers of these problems, by name."""


class Solution(NamedTuple):
    """What is known of a problem at φ.

    Attributes:
        theta: θ_T by name.
        value: h(φ), a 0-dim tensor.
        grads: ∇h(φ) by name.

    >>> from lightning_bilevel.testing import Quadratic
    >>> problem = Quadratic()
    >>> theta, value, grads = problem.solution(problem.episode())
    >>> theta["theta"].shape, value.shape, grads["target"].shape
    (torch.Size([4]), torch.Size([]), torch.Size([3]))
    """

    theta: Params
    value: Tensor
    grads: Params


class PlainProblem(NamedTuple):
    """A problem without a module: what ``hypergradient(problem, strategy, episode, phi=phi, carry=carry)`` takes.

    Attributes:
        problem: pure functions, in plain PyTorch.
        phi: outer parameters.
        carry: the inner state to start from.

    >>> from lightning_bilevel import ReverseUnroll, hypergradient
    >>> from lightning_bilevel.testing import Quadratic
    >>> module = Quadratic()
    >>> problem, phi, carry = module.plain()
    >>> plain = hypergradient(problem, ReverseUnroll(), module.episode(), phi=phi, carry=carry)
    >>> torch.allclose(plain.grads["target"], hypergradient(module, ReverseUnroll(), module.episode()).grads["target"])
    True
    """

    problem: BilevelProblem
    phi: Params
    carry: Carry


class SolvedModule(BilevelModule):
    """A bilevel module that knows its own hypergradient; the base of the problems here.

    A subclass names its parameters and writes both losses as pure functions of named tensors.

    Args:
        inner: the inner optimizer, a key of ``RULES``.
        lr: its learning rate.
        options: of :class:`~lightning_bilevel.BilevelModule`; 3 steps and ``inner_start="reset"`` by default.

    Attributes:
        THETA: names of the inner parameters.
        PHI: names of the outer ones.
        BUFFERS: names of the buffers that the inner loss changes.

    >>> from lightning_bilevel import ForwardUnroll, hypergradient
    >>> from lightning_bilevel.testing import Rates
    >>> module = Rates(inner="Adam")
    >>> episode = module.episode()
    >>> estimate, known = hypergradient(module, ForwardUnroll(), episode), module.solution(episode)
    >>> torch.allclose(estimate.grads["log_lr"], known.grads["log_lr"], rtol=1e-12)
    True
    """

    THETA: ClassVar[tuple[str, ...]]
    PHI: ClassVar[tuple[str, ...]]
    BUFFERS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, inner: str = "SGD", lr: float = 0.2, **options: Any) -> None:
        super().__init__(**{"inner_steps": 3, "inner_start": "reset", **options})
        if inner not in RULES:
            raise value_error(f"{type(self).__name__}(inner=...)", f"one of {', '.join(RULES)}", inner)
        self.inner, self.lr = inner, lr

    @abstractmethod
    def g(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
        """Return the inner loss and the buffers after it; of parameters in both levels θ has the values."""

    @abstractmethod
    def f(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> Tensor:
        """Return the outer loss."""

    @abstractmethod
    def episode(self, seed: int = 0, size: int = 4) -> Episode:
        """Return an episode.

        Args:
            seed: of its data.
            size: examples in an inner batch.
        """

    def solution(self, episode: Episode, seed: int = 0) -> Solution:
        """Return θ_T, h and ∇h, in closed form where there is one.

        Args:
            episode: inner and outer batches.
            seed: that of the estimate to compare with, which decides what the losses draw.
        """
        return self.unrolled(episode, seed)

    def unrolled(self, episode: Episode, seed: int = 0) -> Solution:
        """Return θ_T, h and ∇h by a loop in plain PyTorch; arguments as for :meth:`solution`."""
        phi = {name: value.detach().requires_grad_() for name, value in self.named(self.PHI).items()}
        theta = {name: phi.get(name, value.detach()) for name, value in self.named(self.THETA).items()}
        buffers, rule = self.named(self.BUFFERS), RULES[self.inner]
        state, rate, anchors = rule.init(theta), self.rate(phi), dict(theta)
        with RngState(self.device).fork(_masks(seed)), torch.enable_grad():
            for step in range(self.inner_steps):
                theta = {
                    name: value if value.requires_grad else value.requires_grad_() for name, value in theta.items()
                }
                loss, buffers = self.g(theta, phi, episode.inner[step % len(episode.inner)], buffers)
                for name in set(self.THETA) & set(self.PHI):
                    loss = loss + self.proximal / 2 * (theta[name] - anchors[name]).square().sum()
                grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
                theta, state = rule.update(theta, dict(zip(theta, grads, strict=True)), state, rate, step + 1)
            value = self.f(theta, phi, episode.outer, buffers)
            through = torch.autograd.grad(value, list(phi.values()))
        return Solution(_detached(theta), value.detach(), dict(zip(phi, through, strict=True)))

    def plain(self) -> PlainProblem:
        """Return the same problem as pure functions that know no module."""
        rule, shared = RULES[self.inner], frozenset(self.THETA) & frozenset(self.PHI)
        learned = frozenset({"log_lr"}) & frozenset(self.PHI)
        problem = BilevelProblem(
            inner_loss=self.g,
            outer_loss=self.f,
            update=lambda theta, grads, state, phi, step: rule.update(theta, grads, state, self.rate(phi), step),
            inner_steps=self.inner_steps,
            initial=lambda carried, phi: {name: phi[name] if name in shared else carried[name] for name in self.THETA},
            init_opt_state=lambda theta, phi: rule.init(theta),
            shared=shared,
            solver=(lambda theta, phi, batches, buffers: self.minimum(phi, batches)) if self.has_solver else None,
            elementwise=True,
            traits=Traits(warm=self.inner_start == "warm", learned=lambda: learned, stateful=lambda: bool(rule.slots)),
        )
        if self.proximal:
            problem = with_proximal(problem, self.proximal)
        own = tuple(name for name in self.THETA if name not in shared)
        carry = Carry(InnerState(_detached(self.named(own)), _detached(self.named(self.BUFFERS))))
        return PlainProblem(problem, _detached(self.named(self.PHI)), carry)

    def minimum(self, phi: Params, batches: Sequence[Batch]) -> Params:
        """Return the minimum of g over all batches, where the problem solves it by itself."""
        raise NotImplementedError

    def rate(self, phi: Params) -> Rate:
        """Return the inner learning rate: ``lr``, or the exponential of an outer parameter ``log_lr``."""
        return phi["log_lr"].exp() if "log_lr" in phi else self.lr

    def named(self, names: tuple[str, ...]) -> Params:
        """Return what is in the places of these parameters or buffers now."""
        return {name: attrgetter(name)(self) for name in names}

    def inner_parameters(self) -> Any:
        """Return those of ``THETA``."""
        return list(self.named(self.THETA).values())

    def outer_parameters(self) -> Any:
        """Return those of ``PHI``."""
        return list(self.named(self.PHI).values())

    def inner_loss(self, batch: Batch) -> Tensor:
        """Return g; buffers are changed in place, as those of BatchNorm are."""
        buffers = self.named(self.BUFFERS)
        loss, after = self.g(self.named(self.THETA), self.named(self.PHI), batch, buffers)
        for name, value in after.items():
            buffers[name].copy_(value)
        return loss

    def outer_loss(self, batch: Batch) -> Tensor:
        """Return f."""
        return self.f(self.named(self.THETA), self.named(self.PHI), batch, self.named(self.BUFFERS))

    def configure_inner_optimizer(self) -> InnerOptimizer:
        """Return this package's optimizer."""
        return RULES[self.inner].optimizer(self.rate(self.named(self.PHI)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return gradient descent on φ."""
        return torch.optim.SGD(self.outer_parameters(), lr=0.1)

    def drawn(self, *shape: int, seed: int) -> Tensor:
        """Return standard normal numbers, of the dtype and on the device of this module."""
        return drawn(*shape, seed=seed).to(next(self.parameters()))

    def constants(self, **tensors: Tensor) -> None:
        """Keep tensors that go along with the module, to other devices and dtypes."""
        for name, value in tensors.items():
            self.register_buffer(name, value, persistent=False)


def drawn(*shape: int, seed: int) -> Tensor:
    """Return standard normal numbers in float64.

    >>> drawn(2, seed=0).dtype
    torch.float64
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def placed_episode(inner: Sequence[Batch], outer: Batch, seed: int) -> Episode:
    """Return an episode whose batches have numbers, of eight in all, for strategies that remember something of each.

    >>> placed_episode(["a", "b"], "c", seed=1).inner.inner
    (Place(number=2, of=8), Place(number=3, of=8))
    """
    places = [Place((seed * len(inner) + number) % 8, 8) for number in range(len(inner))]
    return Episode(PlacedBatches(inner, places, Place(seed % 8, 8)), outer)


def _masks(seed: int) -> int:
    """Return the seed of what the losses draw in ``hypergradient(..., seed=seed)``."""
    return Key((seed, 0, 0, 0)).fold_in(-1).seed


def _detached(values: Params) -> Params:
    return {name: value.detach().clone() for name, value in values.items()}
