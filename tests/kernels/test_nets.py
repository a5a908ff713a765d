"""Nets with operations that PyTorch differentiates twice, or forward, only with care.

On each, every engine gives one hypergradient: a plain unroll, a checkpointed one, double-backward tangents, forward AD
where PyTorch has it, and differences of a loop in plain PyTorch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_bilevel import (
    Episode,
    ForwardGradient,
    ForwardUnroll,
    Hypergradient,
    HypergradientStrategy,
    ReverseUnroll,
    TruncatedReverse,
    hypergradient,
    tree,
)
from lightning_bilevel.directions import Gaussian
from lightning_bilevel.tree import Params
from tests.support.nets import CASES, DIFFERENCES, FORWARD, STATISTICS, STRATEGIES, Weighted, data, every_net
from tests.support.problems import assert_close, directional_difference, draw, plain_value, train
from tests.support.seeds import forked, key_of, masks


@cache
def problem(name: str) -> tuple[Weighted, Episode, Hypergradient]:
    """Return a module, an episode and the hypergradient that a plain unroll gives."""
    module, episode = Weighted(name), data(name)
    return module, episode, hypergradient(module, ReverseUnroll(), episode)


# --- One hypergradient ---


@pytest.mark.parametrize("name", DIFFERENCES)
def test_plain_unroll_equals_differences_of_a_plain_loop(name: str) -> None:
    module, episode, result = problem(name)
    for seed in (1, 2):
        v = {key: draw(*grad.shape, seed=seed) for key, grad in result.grads.items()}
        with sdpa_kernel(SDPBackend.MATH):  # other kernels draw other masks
            expected = directional_difference(module, episode, v)
        assert tree.dot(result.grads, v).item() == pytest.approx(expected, rel=1e-6)


@every_net
def test_value_and_state_are_those_of_a_plain_loop(name: str) -> None:
    module, episode, result = problem(name)
    with sdpa_kernel(SDPBackend.MATH), forked(masks()):
        trained = train(module, episode)
    assert_close(result.state.params, tree.detach(trained.inner_named()))
    with sdpa_kernel(SDPBackend.MATH):
        assert result.value.item() == pytest.approx(plain_value(module, episode), rel=1e-9)


@pytest.mark.parametrize("every", [1, 2])
@every_net
def test_checkpointed_unroll(name: str, every: int) -> None:
    check_equal(name, ReverseUnroll(checkpoint=every), problem(name)[2].grads)


@every_net
def test_truncation_after_the_last_step(name: str) -> None:
    check_equal(name, TruncatedReverse(steps=3), problem(name)[2].grads)


@pytest.mark.parametrize("chunk_size", [None, 1])
@every_net
def test_double_backward_tangents(name: str, chunk_size: int | None) -> None:
    check_equal(name, ForwardGradient(2, Gaussian(), chunk_size, mode="double_backward"), contracted(name))


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("name", FORWARD)
def test_forward_tangents(name: str, chunk_size: int | None) -> None:
    check_equal(name, ForwardGradient(2, Gaussian(), chunk_size, mode="forward"), contracted(name))


@pytest.mark.parametrize("name", ["Dropout", "GPT-2, dropout"])
def test_masks_are_replayed_along_every_coordinate(name: str) -> None:
    check_equal(name, ForwardUnroll(chunk_size=2), problem(name)[2].grads)
    module, episode, result = problem(name)
    other = hypergradient(module, ReverseUnroll(), episode, seed=1)
    assert (other.value - result.value).abs() > 1e-6


def contracted(name: str) -> Params:
    """Return ½ Σ ⟨∇h, v_i⟩ v_i for the two directions that the estimates below draw."""
    grads = problem(name)[2].grads
    v = Gaussian().draw(key_of(seed=0), 0, 2, grads)
    return tree.combine(tree.rows_dot(v, grads) / 2, v)


def check_equal(name: str, strategy: HypergradientStrategy, expected: Params) -> None:
    module, episode, reference = problem(name)
    result = hypergradient(module, strategy, episode)
    assert_close(result.grads, expected, 1e-8)
    torch.testing.assert_close(result.value, reference.value)
    assert_close(result.state.params, reference.state.params)
    torch.testing.assert_close(result.state.buffers, reference.state.buffers)


# --- Statistics ---


def judged(module: Weighted, episode: Episode) -> Weighted:
    """Evaluate the outer loss once, which moves statistics too."""
    with torch.no_grad():
        module.outer_loss(episode.outer)
    return module


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_move_as_in_plain_training(name: str, kind: str) -> None:
    strategy = STRATEGIES[kind if CASES[name].forward or kind != "forward" else "chunks"]
    module, episode = Weighted(name), data(name)
    before = {key: buffer.clone() for key, buffer in module.named_buffers()}
    result = hypergradient(module, strategy, episode)
    after = dict(judged(train(module, episode), episode).named_buffers())
    assert any(not torch.equal(before[key], after[key]) for key in before) == CASES[name].training
    moved = {**before, **result.state.buffers}
    torch.testing.assert_close(moved, after, rtol=1e-9, atol=1e-9)
    changed = [key for key, buffer in module.named_buffers() if not torch.equal(buffer, before[key])]
    assert changed == []


def test_statistics_of_stacked_episodes_are_their_own() -> None:
    name = "BatchNorm1d"
    module, several = Weighted(name), [data(name, seed) for seed in range(3)]
    module.episode_chunk_size = None
    result = hypergradient(module, ReverseUnroll(), several)
    expected = [dict(judged(train(module, episode), episode).named_buffers()) for episode in several]
    stacked = {key: torch.stack([buffers[key] for buffers in expected]) for key in expected[0]}
    torch.testing.assert_close(result.state.buffers, stacked)


@pytest.mark.parametrize("mode", ["double_backward", "forward"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_recurrent_nets_in_single_precision(name: str, mode: Any) -> None:
    module, episode = Weighted(name, torch.float32), data(name, dtype=torch.float32)
    grads = hypergradient(module, ForwardUnroll(mode=mode), episode).grads
    assert_close(tree.map(Tensor.double, grads), problem(name)[2].grads, 1e-3)
