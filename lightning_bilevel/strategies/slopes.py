"""What every estimate by random directions has in common: slopes of h along directions, and their mean.

An estimator brings its own way to find slopes: exactly, by pushing tangents (:mod:`.tangent_slopes`), or by
differences of whole inner runs (:mod:`.perturbation`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.directions.base import DirectionSampler
from lightning_bilevel.errors import integer
from lightning_bilevel.problem import Hypergradient
from lightning_bilevel.randomness import Call
from lightning_bilevel.tree import Params


class Slopes(ABC):
    """Slopes of h at φ along any number of directions, a chunk of them at a time.

    Attributes:
        explicit: the part of ∇h that slopes leave out, because it is known; empty if there is none.
        differences: whether slopes are differences, whose error depends on the length and the sign of a direction.
    """

    explicit: Params = {}  # noqa: RUF012  # nobody writes to it
    differences = False

    @abstractmethod
    def chunk_size(self) -> int:
        """Return how many directions one call of :meth:`along` should get at most."""

    @abstractmethod
    def along(self, directions: Params) -> Tensor:
        """Return the slope along each direction, shape ``(n,)``, for directions stacked to ``(n, *shape)``."""

    @abstractmethod
    def result(self, grads: Params) -> Hypergradient:
        """Return ``grads`` with the value, state and metrics of the inner run at φ."""

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut ``range(start, stop)`` into chunks."""
        if start < stop:
            step = balanced_size(stop - start, self.chunk_size())
            for first in range(start, stop, step):
                yield first, min(first + step, stop)


def projected_mean(
    slopes: Slopes, sampler: DirectionSampler, count: int, phi: Params, call: Call, known: Params | None = None
) -> Params:
    r"""Return this process's part of the mean of slopes times directions.

    Over all processes the mean is::

        Σ_j s(q_j) q_j + 1/(b − k) Σ_i s(p_i) p_i,   p_i = v_i − Σ_j ⟨v_i, q_j⟩ q_j.

    With slopes s(v) = ⟨g, v⟩ it is unbiased for g, whatever q is: E[p pᵀ] = I − Σ_j q_j q_jᵀ.

    Slopes that are differences are taken along ±√N q_j: at the length of the random directions, so that the same μ
    suits both, and with random signs, so that the bias that is odd in the sign goes out, as it does for them.

    Args:
        slopes: finds s.
        sampler: draws v, with E[v vᵀ] = I.
        count: b, directions in all; more than k.
        phi: outer parameters.
        call: names the draws, and the shard of the directions that is this process's. With R processes, each returns
            R times its share of the sum, so that their mean is the estimate of one process.
        known: q, k orthonormal directions, stacked: ``(k, *shape)``. The first k of the b.
    """
    k = 0 if known is None else tree.count(known)
    shards = call.shard[1]
    sampler = sampler.of(count - k)
    lengths = _lengths(k, tree.numel(phi) if slopes.differences else 1, call)
    total = tree.zeros_like(phi)
    for first, last in slopes.chunks(*call.bounds(count)):
        v = sampler.draw(call.key, max(first - k, 0), max(last - k, 0), phi)
        weights = torch.full((last - first,), shards / (count - k), dtype=torch.float64)
        if known is not None:
            along = lengths[first:last]
            weights[: len(along)] = shards / along.square()
            if last > k:
                v = complement(v, known)
            v = {name: torch.cat([_longer(known[name][first:last], along), rows]) for name, rows in v.items()}
        found = slopes.along(v)
        total = tree.add(total, tree.combine(weights.to(found) * found, v))
    return total


def _lengths(count: int, squared: int, call: Call) -> Tensor:
    """Return ±√N for each known direction, with the same signs on all processes that share out directions."""
    signs = torch.randint(2, (count,), generator=call.key.fold_in("signs").generator(0))
    return (2 * signs - 1).double() * math.sqrt(squared)


def _longer(rows: Tensor, lengths: Tensor) -> Tensor:
    return rows * lengths.to(rows).view(-1, *[1] * (rows.dim() - 1))


def complement(stacked: Params, known: Params) -> Params:
    """Return rows without their components along orthonormal directions, ``(k, *shape)`` per tensor.

    >>> complement({"w": torch.tensor([[3.0, 4.0]])}, {"w": torch.tensor([[1.0, 0.0]])})
    {'w': tensor([[0., 4.]])}
    """
    for number in range(tree.count(known)):
        q = tree.index(known, number)
        stacked = tree.add(stacked, tree.outer_product(tree.rows_dot(stacked, q), q), alpha=-1)
    return stacked


def balanced_size(count: int, most: int) -> int:
    """Return the size of chunks of at most ``most`` that share out ``count`` evenly: the last one is not left small.

    >>> balanced_size(16, most=15)
    8
    """
    parts = max(1, math.ceil(count / most))
    return max(1, math.ceil(count / parts))


def checked_chunk_size(owner: str, chunk_size: int | None) -> int | None:
    """Return ``chunk_size``; raise the value error unless it is ``None`` or a positive integer."""
    return None if chunk_size is None else integer(f"{owner}(chunk_size=...)", chunk_size)
