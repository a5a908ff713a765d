"""The mean of slopes times directions, from slopes that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_bilevel import Hypergradient, tree
from lightning_bilevel.directions import Gaussian
from lightning_bilevel.problem import InnerState
from lightning_bilevel.strategies.slopes import Slopes, projected_mean
from lightning_bilevel.tree import Params
from tests.support.problems import assert_close, draw
from tests.support.seeds import call_of, key_of

GRADIENT = {"a": draw(2, 2, seed=1), "b": draw(3, seed=2)}
N, COUNT = 7, 6


class Linear(Slopes):
    """⟨g, v⟩, in chunks of a size; notes how many directions came together."""

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, []

    def chunk_size(self) -> int:
        return self.size

    def along(self, directions: Params) -> Tensor:
        rows = tree.flatten(tree.map(lambda value: value.reshape(len(value), -1).T, directions)).reshape(N, -1).T
        self.seen.append(len(rows))
        return rows @ tree.flatten(GRADIENT)

    def result(self, grads: Params) -> Hypergradient:
        return Hypergradient(torch.tensor(0.0), grads, InnerState({}), {})


def orthonormal(count: int) -> Params | None:
    """Return so many orthonormal directions, stacked."""
    return tree.unflatten(torch.linalg.qr(draw(N, count, seed=3)).Q.T, GRADIENT) if count else None


def by_hand(known: Params | None, project: bool = True) -> Params:
    """Return Σ_j s(q_j) q_j + 1/(b − k) Σ_i s(p_i) p_i over all directions."""
    g = tree.flatten(GRADIENT)
    q = torch.zeros(0, N, dtype=g.dtype)
    if known is not None:
        q = torch.cat([value.reshape(len(value), -1) for value in known.values()], dim=1)
    v = Gaussian().flat(key_of(), 0, COUNT - len(q), g)
    p = v - v @ q.T @ q if project else v
    return tree.unflatten(q.T @ (q @ g) + p.T @ (p @ g) / len(p), GRADIENT)


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("known", [0, 1, 3])
def test_the_definition_in_chunks_and_shards(known: int, size: int) -> None:
    q = orthonormal(known)
    for shards in (1, 2, 4):
        each = []
        for number in range(shards):
            slopes = Linear(size)
            each.append(projected_mean(slopes, Gaussian(), COUNT, GRADIENT, call_of(shard=(number, shards)), known=q))
            assert max(slopes.seen) <= size
        mean = tree.scale({name: sum(part[name] for part in each) for name in GRADIENT}, 1 / shards)
        assert_close(mean, by_hand(q), 1e-12)


def test_the_comparison_sees_directions_that_are_not_projected() -> None:
    q = orthonormal(3)
    with pytest.raises(AssertionError, match="^a: "):
        assert_close(by_hand(q, project=False), by_hand(q), 1e-2)


def test_a_process_without_a_share_adds_nothing() -> None:
    slopes = Linear(4)
    shard = call_of(shard=(COUNT, COUNT + 1))
    assert tree.norm(projected_mean(slopes, Gaussian(), COUNT, GRADIENT, shard)) == 0
    assert slopes.seen == []
