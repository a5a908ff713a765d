"""Directions with disjoint supports."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bilevel.directions.base import DirectionSampler
from lightning_bilevel.errors import integer
from lightning_bilevel.randomness import Key

ALONE = 16
"""Directions in a partition where nobody says how many an estimate has: as many as ``ForwardGradient`` has."""


class Blocks(DirectionSampler):
    r"""Share the N entries out to B directions: v_j is ±√(N/n_j) on the n_j entries of block j, and zero elsewhere.

    Entry i is in block (i + s) mod N mod B, with s uniform over 0 to N − 1; the signs are independent. Directions jB to
    (j+1)B − 1 are partition j, with a shift and signs of its own.

    E[v vᵀ] = I: an entry is in block j with probability n_j/N, and signs of different entries are independent.

    Directions of one partition are orthogonal and of length √N, so the mean ĝ = (1/b) Σ_i ⟨∇h, v_i⟩ v_i is unbiased,
    with

    .. math:: E\|\hat g - \nabla h\|^2 = \frac{N - b}{b} \|\nabla h\|^2 \quad (b \le B)

    as for :class:`Orthogonal`, without a decomposition: O(N) for a direction. b directions of several partitions have
    Σ c (N − c) / b², with c directions of each. It is zero for b = B = N.

    Use it in the place of :class:`Orthogonal` where N is large. Not where a gradient has few large entries: each is
    seen by one direction only, and takes the others of its block along. Memory: b × N entries while a chunk is in use.

    Blocks with random signs are those of count sketches: Charikar, Chen and Farach-Colton (2002), Finding frequent
    items in data streams. The estimate is eq. 8 of (FG)²U: Memory-Efficient Gradient Unrolling (arXiv 2406.14095).

    Args:
        blocks: B, at most N; ``None`` takes as many as an estimate draws, and 16 for a sampler by itself.

    Raises:
        ValueError: a bad ``blocks``.

    >>> import torch
    >>> from lightning_bilevel.directions import Key
    >>> v = Blocks(2).flat(Key((1,)), 0, 2, torch.zeros(6))
    >>> torch.allclose(v @ v.T, 6 * torch.eye(2), atol=1e-5), (v != 0).sum(0)
    (True, tensor([1, 1, 1, 1, 1, 1]))
    """

    def __init__(self, blocks: int | None = None) -> None:
        self.blocks = None if blocks is None else integer("Blocks(blocks=...)", blocks)

    @override
    def of(self, count: int) -> Blocks:
        return self if self.blocks is not None else Blocks(count)

    @override
    def error(self, size: int, count: int) -> float:
        blocks = min(self.blocks or ALONE, size)
        partitions, rest = divmod(count, blocks)
        return (partitions * blocks * (size - blocks) + rest * (size - rest)) / count**2

    @override
    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        size = like.numel()
        blocks = min(self.blocks or ALONE, size)
        rows = like.new_zeros(stop - start, size)
        for index, row in enumerate(rows, start):
            # Both are of the partition, whose directions draw them again.
            generator = key.generator(index // blocks, like.device)
            shift = int(torch.randint(size, (1,), generator=generator, device=like.device))
            signs = torch.empty_like(row).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
            # In two pieces, for blocks begin anew where the shifted numbers do.
            for first, last, offset in ((0, size - shift, shift), (size - shift, size, shift - size)):
                place = slice(first + (index - first - offset) % blocks, last, blocks)
                row[place] = signs[place]
            row.mul_(math.sqrt(size / -(-(size - index % blocks) // blocks)))
        return rows
