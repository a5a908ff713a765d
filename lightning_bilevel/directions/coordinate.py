"""One coordinate at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bilevel.directions.base import DirectionSampler
from lightning_bilevel.randomness import Key


class Coordinate(DirectionSampler):
    r"""Draw v = √N e_i with i uniform over all outer parameters jointly.

    E[v vᵀ] = (1/N) Σ_i N e_i e_iᵀ = I.

    The mean ĝ = (1/b) Σ_i ⟨∇h, v_i⟩ v_i over b directions is unbiased, with

    .. math:: E\|\hat g - \nabla h\|^2 = \frac{N - 1}{b} \|\nabla h\|^2

    since ‖v‖² = N. The mean of that error is :class:`Rademacher`'s, its spread is not: an estimate has at most
    b entries that are not zero, so a gradient with few large entries is mostly missed and sometimes
    overshot by N/b. Memory: b × N entries while a chunk is in use.

    Use it where a change of one parameter is cheap or meaningful by itself, such as random coordinate
    descent. √N is rounded in bfloat16, a bias of up to 0.8%, unless N is a square of few digits.

    Paper: Nesterov (2012), Efficiency of coordinate descent methods on huge-scale optimization problems; the
    estimate is eq. 8 of (FG)²U: Memory-Efficient Gradient Unrolling (arXiv 2406.14095).

    >>> import torch
    >>> from lightning_bilevel.directions import Key
    >>> Coordinate().flat(Key((1,)), 0, 2, torch.zeros(4)).sum(dim=1)
    tensor([2., 2.])
    """

    @override
    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        rows = like.new_zeros(stop - start, like.numel())
        for index, row in enumerate(rows, start):
            generator = key.generator(index, like.device)
            position = torch.randint(like.numel(), (1,), generator=generator, device=like.device)
            row.index_fill_(0, position, math.sqrt(like.numel()))
        return rows
