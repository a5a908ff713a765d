"""Small modules for the table of kinds, and the plain loops that they are held against."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from lightning_bilevel import (
    PZOBO,
    SGD,
    BilevelModule,
    Episode,
    ForwardGradient,
    ForwardUnroll,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    ZerothOrder,
)
from lightning_bilevel.directions import Orthogonal
from lightning_bilevel.linear_solvers import Dense

Make = Callable[[int], HypergradientStrategy]
"""From the number of outer parameters to a strategy that is exact, but for rounding."""

EXACT: dict[str, Make] = {
    "reverse": lambda n: ReverseUnroll(),
    "checkpointed": lambda n: ReverseUnroll(checkpoint="sqrt"),
    "forward": lambda n: ForwardUnroll(),
    "forward, one at a time": lambda n: ForwardUnroll(chunk_size=1),
    "forward mode": lambda n: ForwardUnroll(mode="forward"),
    "forward gradient": lambda n: ForwardGradient(n, directions=Orthogonal()),
}
DIFFERENCES: dict[str, Make] = {
    "PZOBO": lambda n: PZOBO(n, mu=1e-6, directions=Orthogonal()),
    "zeroth order": lambda n: ZerothOrder(n, 1e-4, "central", Orthogonal()),
}
IMPLICIT: dict[str, Make] = {"implicit": lambda n: ImplicitGradient(Dense())}
EVERY = {**EXACT, **DIFFERENCES}

RATE = 0.2


class Small(BilevelModule):
    """A net of 21 weights, a factor of its loss and a penalty: p, two outer parameters.

    Subclasses change one thing each.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"inner_steps": 3, "inner_start": "reset", **options})
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.p = nn.Parameter(torch.tensor([0.3, -0.5]))
        self.double()
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)

    def outer_parameters(self) -> Any:
        return [self.p]

    def predicted(self, x: Tensor) -> Tensor:
        return self.net(x)

    def inner_loss(self, batch: Any) -> Tensor:
        x, y = batch[:2]
        fit = (self.predicted(x) - y).square().mean() * self.p[0].exp()
        return fit + self.p[1].exp() * 0.1 * sum(value.square().sum() for value in self.net.parameters())

    def outer_loss(self, batch: Any) -> Tensor:
        return (self.predicted(batch[0]) - batch[1]).square().mean()

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=RATE)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.outer_parameters(), lr=0.1)


def batch(seed: int, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, width, generator=generator, dtype=torch.float64) for width in (3, 1))  # type: ignore[return-value]


def episodes(count: int) -> list[Episode]:
    return [Episode([batch(2 * seed)], batch(2 * seed + 1)) for seed in range(count)]


def sgd(module: Any, step: int, theta: list[Tensor], grads: list[Tensor], memory: dict[str, Any]) -> list[Tensor]:
    """Return the parameters after a step of plain descent."""
    return [value - RATE * grad for value, grad in zip(theta, grads, strict=True)]


Step = Callable[[Any, int, list[Tensor], list[Tensor], dict[str, Any]], list[Tensor]]
"""(module, number from 1, θ, gradients, what the steps remember) to the next θ."""


def seeded() -> None:
    """Let what the members draw from start anew."""
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


def looped(make: Callable[[], Any], chosen: Sequence[Episode], phi: Tensor, step: Step = sgd) -> float:
    """Return the mean outer loss after the inner runs of a plain loop at ``phi``, with the module's own parameters."""
    total = 0.0
    for episode in chosen:
        seeded()
        module = make()
        with torch.no_grad():
            outer = list(module.outer_parameters())
            nn.utils.vector_to_parameters(phi, outer)
        inner = list(module.inner_parameters())
        memory: dict[str, Any] = {}
        with torch.no_grad():
            for name, value in module.initial_inner_parameters().items():
                module.get_parameter(name).copy_(value)
        for number in range(module.inner_steps):
            loss = module.inner_loss(episode.inner[number % len(episode.inner)])
            grads = torch.autograd.grad(loss, inner)
            with torch.no_grad():
                moved = step(module, number + 1, [value.detach().clone() for value in inner], list(grads), memory)
                for value, new in zip(inner, moved, strict=True):
                    value.copy_(new)
        total += float(module.outer_loss(episode.outer)) / len(chosen)
    return total


def slope(make: Callable[[], Any], chosen: Sequence[Episode], step: Step = sgd, eps: float = 1e-5) -> Tensor:
    """Return the gradient of :func:`looped` by central differences."""
    phi = nn.utils.parameters_to_vector(list(make().outer_parameters())).detach().clone()
    rows = eps * torch.eye(len(phi), dtype=phi.dtype)
    return torch.tensor(
        [(looped(make, chosen, phi + row, step) - looped(make, chosen, phi - row, step)) / (2 * eps) for row in rows],
        dtype=torch.float64,
    )


def unrolled(make: Callable[[], Any], chosen: Sequence[Episode], step: Step = sgd) -> Tensor:
    """Return the gradient of the mean outer loss through the graph of all steps, as PyTorch differentiates them."""
    total = torch.zeros(())
    for episode in chosen:
        seeded()
        module = make()
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        inner = {names[id(parameter)]: parameter.detach().clone() for parameter in module.inner_parameters()}
        theta = {**inner, **module.initial_inner_parameters()}
        theta = {name: v if v.requires_grad else v.detach().requires_grad_() for name, v in theta.items()}
        memory: dict[str, Any] = {}
        for number in range(module.inner_steps):
            with _reparametrize_module(module, theta):
                loss = module.inner_loss(episode.inner[number % len(episode.inner)])
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            moved = step(module, number + 1, list(theta.values()), list(grads), memory)
            theta = dict(zip(theta, moved, strict=True))
        with _reparametrize_module(module, theta):
            loss = module.outer_loss(episode.outer)
        outer = list(module.outer_parameters())
        grads = torch.autograd.grad(loss, outer, allow_unused=True, materialize_grads=True)
        total = total + torch.cat([grad.reshape(-1) for grad in grads]) / len(chosen)
    return total


def flat(grads: dict[str, Tensor]) -> Tensor:
    """Return a hypergradient as one vector."""
    return torch.cat([value.reshape(-1) for value in grads.values()])
