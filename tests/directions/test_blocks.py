"""Blocks: disjoint supports, as many as an estimate draws directions, and exact where there is one for each entry."""

from __future__ import annotations

import pytest
import torch

from lightning_bilevel import ForwardGradient
from lightning_bilevel.directions import Blocks
from tests.support.pure import EXACT, N, estimate
from tests.support.seeds import key_of


@pytest.mark.parametrize(("size", "blocks"), [(12, 4), (13, 4), (7, 16), (100, 7)])
def test_a_partition_has_every_entry_once(size: int, blocks: int) -> None:
    count = min(size, blocks)
    rows = Blocks(blocks).flat(key_of(seed=3), 0, 3 * count, torch.zeros(size, dtype=torch.float64))
    partitions = rows.view(3, count, size)
    assert ((partitions != 0).sum(1) == 1).all()
    sizes = (partitions != 0).sum(2)
    assert sizes.max() - sizes.min() <= 1
    identity = size * torch.eye(count, dtype=torch.float64).expand(3, count, count)
    torch.testing.assert_close(partitions @ partitions.mT, identity)
    assert not torch.equal(partitions[0], partitions[1])


def test_every_entry_comes_to_every_block() -> None:
    like = torch.zeros(7)
    seen = torch.stack([Blocks(3).flat(key_of(estimate=each), 0, 3, like) != 0 for each in range(600)]).double()
    shares = torch.tensor([3, 2, 2])[:, None] / 7.0  # n_j/N, for each entry
    assert ((seen.mean(0) - shares).abs() <= 4 * 0.5 / 600**0.5).all()


def test_an_estimate_has_as_many_blocks_as_it_draws_directions() -> None:
    assert Blocks().of(5).blocks == 5
    assert Blocks(3).of(5).blocks == 3
    torch.testing.assert_close(estimate(ForwardGradient(N, Blocks())), EXACT)
    torch.testing.assert_close(estimate(ForwardGradient(3 * N, Blocks(N))), EXACT)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"^Expected `Blocks\(blocks=\.\.\.\)` to be a positive integer, got 0\."):
        Blocks(0)
