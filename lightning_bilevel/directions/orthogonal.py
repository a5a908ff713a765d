"""Blocks of mutually orthogonal directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bilevel.directions.base import DirectionSampler
from lightning_bilevel.directions.gaussian import Gaussian
from lightning_bilevel.randomness import Key


class Orthogonal(DirectionSampler):
    r"""Draw blocks of N mutually orthogonal directions of length √N; directions jN to (j+1)N − 1 are block j.

    A block is √N Q, with Q from the QR decomposition of an N × N Gaussian matrix and the signs of its columns
    set so that R has a positive diagonal: Q is then uniform over the orthogonal matrices (Haar).

    E[v vᵀ] = I: every column of Q is uniform on the sphere, so v has the law of :class:`Sphere`.

    The mean ĝ = (1/b) Σ_i ⟨∇h, v_i⟩ v_i over b directions is unbiased, with

    .. math:: E\|\hat g - \nabla h\|^2 = \frac{N - b}{b} \|\nabla h\|^2 \quad (b \le N)

    because ĝ = (N/b) P ∇h for the projection P on a random subspace of dimension b, and E⟨∇h, P∇h⟩ =
    (b/N) ‖∇h‖². It is zero for b = N, and r (N − r) / b² for r = b mod N: whole blocks are exact.

    Memory and cost: column c of the Gaussian matrix is drawn with the generator of its own direction, and the
    first m columns of Q depend on the first m Gaussian columns alone. A call decomposes the columns from the
    start of the block to ``stop``, m × N entries and O(N m²) operations, so a later chunk of a block draws
    the earlier ones again. What is drawn depends on the cut in the last digits only.

    Use it when b is not small against N: the error falls by b/N of :class:`Rademacher`'s. Not for N in the
    millions, where nothing is gained: random directions are nearly orthogonal by themselves, and those of
    :class:`Blocks` are so without a decomposition.

    Paper: Rowland et al. (2018), Geometrically Coupled Monte Carlo Sampling; Mezzadri (2007), How to
    Generate Random Matrices from the Classical Compact Groups, for the signs. The estimate is eq. 8 of (FG)²U:
    Memory-Efficient Gradient Unrolling (arXiv 2406.14095).

    >>> import torch
    >>> from lightning_bilevel.directions import Key
    >>> v = Orthogonal().flat(Key((1,)), 0, 3, torch.zeros(3))
    >>> torch.allclose(v.T @ v / 3, torch.eye(3), atol=1e-5)
    True
    """

    @override
    def error(self, size: int, count: int) -> float:
        rest = count % size
        return rest * (size - rest) / count**2

    @override
    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        size = like.numel()
        rows = like.new_empty(stop - start, size)
        wide = like.new_empty(size, dtype=torch.promote_types(like.dtype, torch.float32))  # no QR below float32
        for block in range(start - start % size, stop, size):
            end = min(block + size, stop)
            q, r = torch.linalg.qr(Gaussian().flat(key, block, end, wide).T)
            # copysign rather than sign: a diagonal entry that is exactly zero must not erase its direction.
            q = q * torch.copysign(r.new_tensor(math.sqrt(size)), r.diagonal())
            first = max(block, start)
            rows[first - start : end - start] = q.T[first - block :]
        return rows
