"""Embeddings under vmap: the padding of every member stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import vmap

from lightning_bilevel import ForwardUnroll, ReverseUnroll, hypergradient
from lightning_bilevel.kernels.embedding import NATIVE, embedding
from tests.support.seeds import forked
from tests.support.shared import EPISODES, Shared, close, episodes


class Embedded(Shared):
    def __init__(self, chunk: int | None = None) -> None:
        super().__init__(chunk)
        with forked(0):
            self.table = nn.Embedding(4, 3, padding_idx=0).double()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.table(x).mean(1))


def test_padding_of_every_episode_stays_as_it_is() -> None:
    """PyTorch's own rule for ``vmap`` leaves out the gradient of the first episode's padding only."""
    looped, stacked = (hypergradient(Embedded(chunk), ReverseUnroll(), episodes(whole=True)) for chunk in (1, None))
    close(stacked, looped)
    assert stacked.state.params["table.weight"].shape == (EPISODES, 4, 3)
    assert not stacked.state.params["table.weight"][:, 0].any()
    close(hypergradient(Embedded(), ForwardUnroll(mode="forward"), episodes(whole=True)), looped)


def test_an_embedding_under_vmap() -> None:
    tables = torch.randn(EPISODES, 5, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1, 1], [2, 1, 4], [1, 1, 1]])
    expected = torch.stack([NATIVE(table, row, 1) for table, row in zip(tables, index, strict=True)])
    found = vmap(lambda table, row: embedding(table, row, 1))(tables, index)
    assert torch.equal(found, expected)
    of_found, of_expected = (torch.autograd.grad(value.sin().sum(), tables)[0] for value in (found, expected))
    torch.testing.assert_close(of_found, of_expected)
