"""Attention is fused where it is differentiated once, and plain where PyTorch's kernels have no rule."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bilevel import FirstOrder, HypergradientStrategy, ReverseUnroll, hypergradient
from lightning_bilevel.kernels.attention import unfused
from lightning_bilevel.problem import Episode
from tests.support.problems import Problem, assert_close, draw

made: set[str] = set()
"""Nodes of the graph; not in the module, of which an estimate leaves no trace."""


class Attention(Problem):
    """g = mean (softmax(q xᵀ) x)² · φ, f the same without φ."""

    def __init__(self) -> None:
        super().__init__(inner_steps=2, inner_start="reset")
        self.query, self.scale = (torch.nn.Parameter(draw(*shape, seed=1)) for shape in ((1, 2, 3, 4), ()))

    def outer_parameters(self):
        return [self.scale]

    def outer_loss(self, batch: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(self.query, batch, batch)
        made.add(type(attended.grad_fn).__name__)
        return attended.square().mean()

    def inner_loss(self, batch: Tensor) -> Tensor:
        return self.outer_loss(batch) * self.scale

    def configure_inner_optimizer(self):
        return torch.optim.SGD([self.query], lr=0.1)


def data(seed: int) -> Episode:
    return Episode([draw(1, 2, 5, 4, seed=seed)], draw(1, 2, 5, 4, seed=seed + 10))


@pytest.mark.parametrize("strategy", [FirstOrder(), ReverseUnroll()], ids=["once", "twice"])
def test_it_is_fused_where_it_is_differentiated_once(strategy: HypergradientStrategy) -> None:
    made.clear()
    hypergradient(Attention(), strategy, data(0))
    assert any("FlashAttention" in name for name in made) == (not strategy.second_order)


def test_stacked_episodes_take_plain_operations() -> None:
    """PyTorch has no rule for the fused kernel under ``vmap``: it would loop, with a warning."""
    module, episodes = Attention(), [data(0), data(1)]
    stacked = hypergradient(module, FirstOrder(), episodes)
    module.episode_chunk_size = 1
    assert_close(stacked.state.params, hypergradient(module, FirstOrder(), episodes).state.params, 1e-12)


def test_what_was_enabled_is_enabled_again() -> None:
    enabled = (torch.backends.cuda.flash_sdp_enabled, torch.backends.mha.get_fastpath_enabled)
    before = [each() for each in enabled]
    with contextlib.suppress(ArithmeticError), unfused(), unfused():
        assert not any(each() for each in enabled)
        raise ArithmeticError
    assert [each() for each in enabled] == before
