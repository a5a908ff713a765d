"""Embeddings and bags of them: derivatives of the gradient that an optimizer sees, of all kinds and options.

The oracle is PyTorch's own gradient and its central differences.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from lightning_bilevel import (
    SGD,
    BilevelModule,
    Episode,
    ForwardUnroll,
    ReverseUnroll,
    ZerothOrder,
    hypergradient,
)
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.kernels import embedding as kernels
from lightning_bilevel.kernels.inner_gradient import inner_gradient, is_no_derivative
from lightning_bilevel.kernels.safe import differentiable_kernels
from tests.support.problems import draw, generator

STEP = 1e-5
INDICES = torch.tensor([0, 0, 0, 1, 3, 1, 2])
OFFSETS = torch.tensor([0, 2, 2, 5])  # the second bag is empty
SHARES = draw(7, seed=5)

LOOKUPS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda table: F.embedding(INDICES, table),
    "sparse": lambda table: F.embedding(INDICES, table, sparse=True),
    "frequencies": lambda table: F.embedding(INDICES, table, scale_grad_by_freq=True),
    "frequencies of a matrix": lambda table: F.embedding(INDICES[:6].view(2, 3), table, scale_grad_by_freq=True),
    "sum": lambda table: F.embedding_bag(INDICES, table, OFFSETS, mode="sum"),
    "mean": lambda table: F.embedding_bag(INDICES, table, OFFSETS, mode="mean"),
    "max": lambda table: F.embedding_bag(INDICES, table, OFFSETS, mode="max"),
    "matrix": lambda table: F.embedding_bag(INDICES[:6].view(2, 3), table, mode="mean"),
    "last offset": lambda table: F.embedding_bag(INDICES, table, OFFSETS, mode="sum", include_last_offset=True),
    "sparse bag": lambda table: F.embedding_bag(INDICES, table, OFFSETS, mode="sum", sparse=True),
    "weights": lambda table: F.embedding_bag(INDICES, table, OFFSETS, mode="sum", per_sample_weights=SHARES),
    "learned weights": lambda table: F.embedding_bag(
        INDICES, table, OFFSETS, mode="sum", per_sample_weights=table[:, 0].sin()[INDICES]
    ),
}
# PyTorch can combine no others. Rows of padding are constants to it, so that its own values are no oracle for them.
PADDED: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda table: F.embedding(INDICES, table, padding_idx=1),
    "frequencies": lambda table: F.embedding(INDICES, table, padding_idx=1, scale_grad_by_freq=True),
    "sum": lambda table: F.embedding_bag(INDICES, table, OFFSETS, mode="sum", padding_idx=1),
    "mean": lambda table: F.embedding_bag(INDICES, table, OFFSETS, mode="mean", padding_idx=1),
    "max": lambda table: F.embedding_bag(INDICES, table, OFFSETS, mode="max", padding_idx=1),
}


def loss_of(lookup: Callable[[Tensor], Tensor], table: Tensor) -> Tensor:
    out = lookup(table)
    weights = torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)
    return (out.sin() * weights).sum() + 0.1 * out.sum() ** 3


def gradient(lookup: Callable[[Tensor], Tensor], table: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    leaf = table.detach().clone().requires_grad_()
    loss = loss_of(lookup, leaf)
    with inner_gradient():
        (found,) = torch.autograd.grad(loss, leaf, create_graph=create_graph)
    return leaf, found.to_dense() if found.is_sparse else found


def check(lookup: Callable[[Tensor], Tensor], frozen: list[int]) -> None:
    """Compare with differences along directions that leave the ``frozen`` rows as they are."""
    table, v, w = (draw(5, 2, seed=seed) for seed in (1, 2, 3))
    v[frozen], w[frozen] = 0, 0
    ends = [gradient(lookup, table + sign * STEP * v)[1] for sign in (1, -1)]
    expected = ((ends[0] - ends[1]) * w).sum().item() / (2 * STEP)
    values = [loss_of(lookup, table + sign * STEP * v).item() for sign in (1, -1)]
    native = gradient(lookup, table)[1]

    def seen(table: Tensor) -> Tensor:
        with inner_gradient():
            return grad(lambda table: loss_of(lookup, table))(table)

    with differentiable_kernels(nn.Identity()):
        leaf, found = gradient(lookup, table, create_graph=True)
        (pulled,) = torch.autograd.grad((found * w).sum(), leaf)
        pushed = vmap(lambda v: jvp(seen, (table,), (v,))[1])(torch.stack([v, -v]))[0]
        (outer,) = torch.autograd.grad(loss_of(lookup, leaf), leaf)
        several = torch.stack([table, table.flip(0)]).requires_grad_()
        losses = vmap(lambda table: loss_of(lookup, table))(several)
        with inner_gradient():
            (stacked,) = torch.autograd.grad(losses.sum(), several, create_graph=True)
        (of_stacked,) = torch.autograd.grad((stacked[0] * w).sum(), several)
    torch.testing.assert_close(found, native)
    torch.testing.assert_close(stacked[0], native)
    for row in frozen:
        assert (native[row] == 0).all()
        assert (pulled[row] == 0).all()
        assert (outer[row] == 0).all()
    assert (pulled * v).sum().item() == pytest.approx(expected, rel=1e-6)
    assert (of_stacked[0] * v).sum().item() == pytest.approx(expected, rel=1e-6)
    assert (pushed * w).sum().item() == pytest.approx(expected, rel=1e-6)
    assert (outer * v).sum().item() == pytest.approx((values[0] - values[1]) / (2 * STEP), rel=1e-6)


@pytest.mark.parametrize("name", LOOKUPS)
def test_derivatives_agree_with_differences_of_pytorchs_gradient(name: str) -> None:
    check(LOOKUPS[name], [])


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_a_constant(name: str) -> None:
    check(PADDED[name], [1])


def test_gradients_that_are_scaled_are_no_derivatives() -> None:
    table = draw(5, 2, seed=1).requires_grad_()
    with differentiable_kernels(nn.Identity()):
        assert is_no_derivative(LOOKUPS["frequencies"](table).sum())
        assert not is_no_derivative(LOOKUPS["mean"](table).sum())


BAGS = [
    (mode, padding, last, weights)
    for mode, padding, last, weights in itertools.product((0, 1, 2), (None, 0, 1), (False, True), (False, True))
    if mode == 0 or not weights
]


@pytest.mark.parametrize(("mode", "padding", "last", "weights"), BAGS)
@pytest.mark.parametrize("offsets", [[0, 2, 2, 5], [0, 2, 2, 7], [0, 7]])
def test_bags_are_pytorchs(mode: int, padding: int | None, last: bool, weights: bool, offsets: list[int]) -> None:
    table = draw(5, 2, seed=1)
    table[1] = table[3]  # of equal ones the first is taken
    shares = SHARES.clone().requires_grad_() if weights else None
    inputs = [table.requires_grad_()] + ([shares] if shares is not None else [])
    found = []
    for function in (torch.embedding_bag, kernels.embedding_bag):
        none = -1 if function is torch.embedding_bag else None
        options = (False, mode, False, shares, last, none if padding is None else padding)
        out = function(table, INDICES, torch.tensor(offsets), *options)[0]
        loss = (out.sin() * draw(*out.shape, seed=2)).sum()
        found.append([out, *torch.autograd.grad(loss, inputs)])
    torch.testing.assert_close(*found)


# --- Whole runs ---


class Rows(BilevelModule):
    """The rates of two inner losses are the outer parameters."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(inner_steps=3, inner_start="reset")
        self.table = layer.double()
        with torch.no_grad():
            self.table.weight.copy_(draw(*self.table.weight.shape, seed=1))
        self.p = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def inner_parameters(self):
        return self.table

    def inner_loss(self, batch):
        rows = self.table(batch)
        return self.p[0].exp() * (rows - 1).square().sum() + self.p[1].exp() * 0.1 * (rows**4).sum()

    def outer_loss(self, batch):
        return (self.table(batch) - 0.5).square().sum()

    def configure_inner_optimizer(self):
        return SGD(lr=0.05)


def trained(layer: nn.Module, batch: Tensor, p: Tensor) -> float:
    module = Rows(layer)
    module.p.data.copy_(p)
    optimizer = torch.optim.SGD(module.table.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        module.inner_loss(batch).backward()
        optimizer.step()
    return module.outer_loss(batch).item()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Embedding": lambda: nn.Embedding(5, 2, padding_idx=2),
    "Embedding, sparse": lambda: nn.Embedding(5, 2, sparse=True),
    "Embedding, frequencies": lambda: nn.Embedding(5, 2, scale_grad_by_freq=True),
    "EmbeddingBag, sum": lambda: nn.EmbeddingBag(5, 2, mode="sum"),
    "EmbeddingBag, mean": lambda: nn.EmbeddingBag(5, 2, mode="mean", padding_idx=2),
    "EmbeddingBag, max": lambda: nn.EmbeddingBag(5, 2, mode="max"),
    "EmbeddingBag, sparse": lambda: nn.EmbeddingBag(5, 2, mode="mean", sparse=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_run_agrees_with_differences_of_a_plain_loop(name: str) -> None:
    batch = torch.randint(5, (3, 4), generator=generator(0))
    slopes = []
    for row in torch.eye(2, dtype=torch.float64):
        ends = [trained(LAYERS[name](), batch, sign * STEP * row) for sign in (1, -1)]
        slopes.append((ends[0] - ends[1]) / (2 * STEP))
    for strategy in (ReverseUnroll(), ReverseUnroll(checkpoint=1), ForwardUnroll(), ForwardUnroll(mode="forward")):
        result = hypergradient(Rows(LAYERS[name]()), strategy, Episode([batch], batch))
        assert result.value.item() == pytest.approx(trained(LAYERS[name](), batch, torch.zeros(2)), rel=1e-12)
        assert result.grads["p"].tolist() == pytest.approx(slopes, rel=1e-6)


@pytest.mark.parametrize("strategy", [ReverseUnroll(), ZerothOrder(2)], ids=["reverse", "zeroth"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_is_refused(kind: Any, strategy: Any) -> None:
    batch = torch.tensor([[0, 1, 1]])
    module = Rows(kind(5, 2, max_norm=1.0))
    before = module.table.weight.clone()
    with pytest.raises(MisconfigurationError, match=r"^Cannot use `Embedding\(max_norm=1.0\)` in a loss"):
        hypergradient(module, strategy, Episode([batch], batch))
    assert torch.equal(module.table.weight, before)


def test_max_norm_of_a_weight_that_nothing_differentiates() -> None:
    weight = draw(3, 2, seed=0) * 10
    with differentiable_kernels(nn.Identity()):
        assert F.embedding(torch.tensor([1]), weight, max_norm=1.0).norm().item() == pytest.approx(1, abs=1e-6)


def test_frequencies_of_bags_are_refused() -> None:
    batch = torch.tensor([[0, 1, 1]])
    module = Rows(nn.EmbeddingBag(5, 2, mode="sum", scale_grad_by_freq=True))
    with pytest.raises(MisconfigurationError, match=r"^Cannot use `EmbeddingBag\(scale_grad_by_freq=True\)` in a loss"):
        hypergradient(module, ReverseUnroll(), Episode([batch], batch))


def test_pytorch_divides_bags_by_the_counts_of_other_rows() -> None:
    """Why they are refused: row 3 occurs once and row 0 three times; its share is neither 1 nor 1/3."""
    table = torch.ones(5, 1, dtype=torch.float64, requires_grad=True)
    out = F.embedding_bag(INDICES, table, OFFSETS, mode="sum", scale_grad_by_freq=True)
    (found,) = torch.autograd.grad(out.sum(), table)
    assert found[3].item() == pytest.approx(1 / 2)
