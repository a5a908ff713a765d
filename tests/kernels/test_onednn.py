"""Products by oneDNN are the same products, with the same derivatives; vendor and size decide who makes which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bilevel import (
    Episode,
    ForwardGradient,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    hypergradient,
)
from lightning_bilevel.kernels import linear, onednn
from lightning_bilevel.kernels.onednn import is_faster, is_large, product
from lightning_bilevel.kernels.safe import differentiable_kernels
from lightning_bilevel.linear_solvers import Neumann
from tests.support.compiled import CLASSES, FEATURES, apart, episode, weighted

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="there is no oneDNN")


@pytest.mark.parametrize(
    ("text", "expected"), [("vendor_id : AuthenticAMD", True), ("vendor_id : GenuineIntel", False)]
)
def test_the_vendor_decides(text: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_vendor", lambda: text)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert is_faster.__wrapped__() is expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not is_faster.__wrapped__()


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, CLASSES))


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Choose oneDNN for all products of some size, and note those that it makes."""
    made: list[tuple[int, ...]] = []
    plain = onednn._product

    def noted(a: Tensor, b: Tensor) -> Tensor:
        made.append((*a.shape, b.shape[1]))
        return plain(a, b)

    monkeypatch.setattr(linear, "BY_ONEDNN", True)
    monkeypatch.setattr(onednn, "LEAST_OPERATIONS", 100)
    monkeypatch.setattr(onednn, "_product", noted)
    return made


def derivatives(values: list[Tensor], function: Any) -> list[Tensor]:
    """Return a value, its gradient, and the gradient of the square of that."""
    leaves = [value.detach().requires_grad_() for value in values]
    output = function(*leaves)
    grads = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
    return [output, *grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)]


@pytest.mark.parametrize("shape", [(30, 20), (2, 15, 20), (20,)])
@pytest.mark.parametrize("biased", [True, False])
def test_layers_and_their_derivatives(shape: tuple[int, ...], biased: bool, chosen: list[tuple[int, ...]]) -> None:
    values = [torch.randn(shape), torch.randn(10, 20), *([torch.randn(10)] if biased else [])]
    with differentiable_kernels(None):
        found = derivatives(values, F.linear)
    for a, b in zip(found, derivatives(values, F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(chosen) >= 5


def test_products_of_a_batch_of_cotangents(chosen: list[tuple[int, ...]]) -> None:
    a, b, g = torch.randn(30, 20, requires_grad=True), torch.randn(20, 10, requires_grad=True), torch.randn(4, 30, 10)
    for fn in (product, torch.matmul):
        found = torch.autograd.grad(fn(a, b), [a, b], g, is_grads_batched=True)
        torch.testing.assert_close(found[0], g @ b.t())
        torch.testing.assert_close(found[1], a.t() @ g)


def test_others_are_left_as_they_are(chosen: list[tuple[int, ...]]) -> None:
    x, w = torch.randn(30, 20), torch.randn(10, 20)
    with differentiable_kernels(None):
        F.linear(x.double(), w.double())
        F.linear(x[:1].expand(30, 20), w)
        F.linear(x[:0], w)
        torch.func.jvp(lambda w: F.linear(x, w), (w,), (w,))
        with torch.autograd.forward_ad.dual_level():
            F.linear(x, torch.autograd.forward_ad.make_dual(w, w))
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x, w).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            F.linear(x, w.t())
    assert not chosen
    assert not is_large(torch.ones(5, 5), torch.ones(5, 1))


@pytest.mark.parametrize(
    "strategy",
    [ReverseUnroll(), ReverseUnroll("sqrt"), ForwardGradient(3), ImplicitGradient(Neumann(3, step_size=0.1))],
)
def test_estimates(
    strategy: HypergradientStrategy, chosen: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = weighted(net=perceptron, compile=False)
    one: Episode = episode()
    found = hypergradient(module, strategy, one)
    assert chosen
    monkeypatch.setattr(linear, "BY_ONEDNN", False)
    assert apart(found, hypergradient(module, strategy, one)) < 2e-6
