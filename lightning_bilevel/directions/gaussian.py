"""Standard normal directions."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from lightning_bilevel.directions.base import DirectionSampler
from lightning_bilevel.randomness import Key


class Gaussian(DirectionSampler):
    r"""Draw every entry of v from the standard normal law, independently.

    E[v vᵀ] = I: the entries are independent with mean 0 and variance 1.

    The mean ĝ = (1/b) Σ_i ⟨∇h, v_i⟩ v_i over b directions is unbiased, with

    .. math:: E\|\hat g - \nabla h\|^2 = \frac{N + 1}{b} \|\nabla h\|^2

    by E[v_i⁴] = 3; :class:`Rademacher` has N − 1. Memory: b × N entries while a chunk is in use.

    Use it for finite differences (``ZerothOrder``, ``PZOBO``), whose theory is that of the Gaussian smoothing
    h_μ(φ) = E h(φ + μv). With exact derivatives :class:`Rademacher` has the smaller error.

    Paper: Nesterov and Spokoiny (2017), Random Gradient-Free Minimization of Convex Functions; the estimate
    is eq. 8 of (FG)²U: Memory-Efficient Gradient Unrolling (arXiv 2406.14095).

    >>> import torch
    >>> from lightning_bilevel.directions import Key
    >>> v = Gaussian().flat(Key((1,)), 0, 1000, torch.zeros(3))
    >>> torch.allclose(v.T @ v / 1000, torch.eye(3), atol=0.2)
    True
    """

    @override
    def error(self, size: int, count: int) -> float:
        return (size + 1) / count

    @override
    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        rows = like.new_empty(stop - start, like.numel())
        for index, row in enumerate(rows, start):
            row.normal_(generator=key.generator(index, like.device))
        return rows
