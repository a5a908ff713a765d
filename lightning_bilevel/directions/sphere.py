"""Directions of constant length, uniform on the sphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bilevel.directions.base import DirectionSampler
from lightning_bilevel.directions.gaussian import Gaussian
from lightning_bilevel.randomness import Key


class Sphere(DirectionSampler):
    r"""Draw v uniformly from the sphere of radius √N over all outer parameters jointly.

    E[v vᵀ] = I: the law is unchanged by rotations, so E[v vᵀ] = c I, and the trace gives c N = ‖v‖² = N.
    It is drawn as √N z / ‖z‖ with Gaussian z.

    The mean ĝ = (1/b) Σ_i ⟨∇h, v_i⟩ v_i over b directions is unbiased, with

    .. math:: E\|\hat g - \nabla h\|^2 = \frac{N - 1}{b} \|\nabla h\|^2

    as for :class:`Rademacher`, since ‖v‖² = N. Memory: b × N entries while a chunk is in use.

    Use it for finite differences when every probe is to have the same length μ√N. With exact derivatives
    :class:`Rademacher` has the same error and is exact in low precision.

    Paper: Flaxman, Kalai and McMahan (2005), Online convex optimization in the bandit setting; the
    estimate is eq. 8 of (FG)²U: Memory-Efficient Gradient Unrolling (arXiv 2406.14095).

    >>> import torch
    >>> from lightning_bilevel.directions import Key
    >>> v = Sphere().flat(Key((1,)), 0, 2, torch.zeros(9))
    >>> torch.allclose(v.norm(dim=1), torch.tensor([3.0, 3.0]))
    True
    """

    @override
    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        # A norm below float32 would be rounded, and with it the whole direction.
        wide = like.new_empty(like.numel(), dtype=torch.promote_types(like.dtype, torch.float32))
        rows = Gaussian().flat(key, start, stop, wide)
        rows.mul_(math.sqrt(like.numel()) / torch.linalg.vector_norm(rows, dim=1, keepdim=True))
        return rows.to(like.dtype)
