"""Large matrix products by oneDNN, on CPUs on which MKL is slow.

MKL makes float32 products on AMD's CPUs at half of what oneDNN does, which the same PyTorch has inside (100 and 205
GFLOP/s were measured there). There is no public switch for float32, so PyTorch's operator for linear layers is called.
Which products go there is decided by the vendor and by their size, never by a measurement, so that a resumed fit takes
the same kernels.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST_OPERATIONS = 2_000_000
"""Operations of a product below which MKL is as fast."""

_LIBRARY = torch.library.Library("lightning_bilevel", "DEF")
_LIBRARY.define("product(Tensor a, Tensor b) -> Tensor")


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b; an operator of our own, for Inductor takes oneDNN's with constant weights only."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return result


def _fake_product(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


_LIBRARY.impl("product", _product, "CPU")
torch.library.register_fake("lightning_bilevel::product", _fake_product, lib=_LIBRARY)


@functools.cache
def is_faster() -> bool:
    """Return whether oneDNN is there, and known to be faster than MKL on this CPU."""
    there = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and torch.backends.mkldnn.is_available() and "AuthenticAMD" in _vendor()


def _vendor() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else platform.processor()


def is_large(a: Tensor, b: Tensor) -> bool:
    """Return whether a product is one for oneDNN, which makes those of expanded tensors slowly.

    >>> a, b = torch.ones(200, 100), torch.ones(100, 100)
    >>> is_large(a, b), is_large(a[:1].expand(200, 100), b), is_large(a[:9], b)
    (True, False, False)
    """
    dense = all(x.dtype == torch.float32 and x.device.type == "cpu" and x.layout is torch.strided for x in (a, b))
    return dense and 0 not in (*a.stride(), *b.stride()) and 2 * a.numel() * b.shape[1] >= LEAST_OPERATIONS


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, by oneDNN where that is large; so are its derivatives of every order.

    Args:
        a: ``(n, k)``.
        b: ``(k, m)``.

    >>> a, b = torch.randn(200, 100, requires_grad=True), torch.randn(100, 100)
    >>> torch.allclose(product(a, b), a @ b, atol=1e-4)
    True
    """
    result: Tensor = _Product.apply(a, b)
    return result


class _Product(torch.autograd.Function):
    """a @ b is linear in both, so that its derivatives are products again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _product(a, b) if is_large(a, b) else a @ b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (g,), (a, b) = grads, ctx.saved_tensors
        times = torch.matmul if torch._C._are_functorch_transforms_active() else product
        by_a, by_b = ctx.needs_input_grad
        return times(g, b.t()) if by_a else None, times(a.t(), g) if by_b else None
