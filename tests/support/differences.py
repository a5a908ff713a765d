"""Strategies of finite differences, and the plain loops that they are held against."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_bilevel import PZOBO, Episode, HypergradientStrategy, ZerothOrder, tree
from lightning_bilevel.directions import DirectionSampler, Gaussian, Key
from lightning_bilevel.tree import Params
from tests.support.problems import Problem, train

Make = Callable[..., HypergradientStrategy]
"""(number of directions, μ) to a strategy."""

FORWARD, CENTRAL = partial(ZerothOrder, scheme="forward"), partial(ZerothOrder, scheme="central")
BOTH = {"forward": FORWARD, "central": CENTRAL}
EVERY: dict[str, Make] = {**BOTH, "PZOBO": PZOBO}

every_kind = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
both_ways = pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])


class UnitPerTensor(DirectionSampler):
    """Broken: a Gaussian direction divided by its norm in each tensor, as in PZOBO's public code."""

    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        raise AssertionError("drawn per tensor")

    def draw(self, key: Key, start: int, stop: int, like: Params) -> Params:
        drawn = Gaussian().draw(key, start, stop, like)
        return {
            name: v / v.reshape(len(v), -1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1)) for name, v in drawn.items()
        }


def along(slopes: list[float] | Tensor, directions: Params) -> Params:
    """Return the mean of slopes times directions."""
    slopes = torch.as_tensor(slopes, dtype=torch.float64)
    return {name: (slopes.reshape(-1, *[1] * (v.ndim - 1)) * v).mean(0) for name, v in directions.items()}


def inner_products(a: Params, directions: Params) -> Tensor:
    """Return ⟨a, v_i⟩, shape ``(n,)``."""
    return torch.stack([(a[name] * v).reshape(len(v), -1).sum(1) for name, v in directions.items()]).sum(0)


def plain_gradients(module: Problem, episode: Episode) -> tuple[Params, Params, Params]:
    """Return θ_T, d = ∂f/∂θ_T and c = ∂f/∂φ of a plain loop; c is zero for shared parameters."""
    trained = train(module, episode)
    theta, phi = trained.inner_named(), trained.outer_named()
    own = {name: value for name, value in phi.items() if name not in theta}
    grads = torch.autograd.grad(trained.outer_loss(episode.outer), [*theta.values(), *own.values()], allow_unused=True)
    d, c = tree.like(theta, grads[: len(theta)]), tree.like(own, grads[len(theta) :])
    return tree.detach(theta), d, {name: c.get(name, torch.zeros_like(value)) for name, value in phi.items()}
