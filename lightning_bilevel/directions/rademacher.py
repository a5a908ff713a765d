"""Random signs."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from lightning_bilevel.directions.base import DirectionSampler
from lightning_bilevel.randomness import Key


class Rademacher(DirectionSampler):
    r"""Draw every entry of v as ±1 with probability 1/2, independently.

    E[v vᵀ] = I: E[v_i v_j] = E[v_i] E[v_j] = 0 for i ≠ j, and v_i² = 1 always.

    The mean ĝ = (1/b) Σ_i ⟨∇h, v_i⟩ v_i over b directions is unbiased, with

    .. math:: E\|\hat g - \nabla h\|^2 = \frac{N - 1}{b} \|\nabla h\|^2,

    from E‖⟨∇h, v⟩ v‖² = N ‖∇h‖², since ‖v‖² = N. No law of independent directions does better on average over
    the orientation of ∇h: there the same term is E‖v‖⁴ / N ≥ (E‖v‖²)² / N = N times ‖∇h‖².
    Memory: b × N entries while a chunk is in use, none in between.

    Use it by default. ±1 is exact in every dtype, so nothing is lost in bfloat16 and float16. For b ≥ N
    take :class:`Orthogonal`.

    Paper: (FG)²U: Memory-Efficient Gradient Unrolling (arXiv 2406.14095), eq. 8–10 and Lemma 3.1.

    >>> import torch
    >>> from lightning_bilevel.directions import Key
    >>> v = Rademacher().flat(Key((1,)), 0, 4, torch.zeros(3))
    >>> v.shape, bool((v.abs() == 1).all())
    (torch.Size([4, 3]), True)
    >>> torch.equal(v[2:], Rademacher().flat(Key((1,)), 2, 4, torch.zeros(3)))
    True
    """

    @override
    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        rows = like.new_empty(stop - start, like.numel())
        for index, row in enumerate(rows, start):
            row.bernoulli_(0.5, generator=key.generator(index, like.device))
        return rows.mul_(2).sub_(1)
