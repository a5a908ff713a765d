"""The interface of a direction sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.randomness import Key
from lightning_bilevel.tree import Params


class DirectionSampler(ABC):
    """Draws random directions v over all outer parameters jointly, with E[v vᵀ] = I.

    A direction is a pure function of its key and its global number: it is drawn again rather
    than stored, and one process draws the same directions as many. How the range of numbers
    is cut into calls must not change what is drawn, beyond rounding.

    >>> class Axis(DirectionSampler):
    ...     def flat(self, key, start, stop, like):
    ...         axes = [torch.randint(len(like), (1,), generator=key.generator(i)) for i in range(start, stop)]
    ...         return len(like) ** 0.5 * torch.eye(len(like), dtype=like.dtype)[torch.cat(axes)]
    >>> Axis().flat(Key((1,)), 0, 2, torch.zeros(4)).norm(dim=1)
    tensor([2., 2.])
    """

    @abstractmethod
    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        """Return directions ``start`` to ``stop - 1`` as rows of a ``(stop - start, N)`` tensor.

        Args:
            key: names the estimate.
            start: global number of the first direction.
            stop: one past the last.
            like: a vector of shape ``(N,)`` that sets N, dtype and device.
        """

    def of(self, count: int) -> DirectionSampler:
        """Return the sampler for an estimate that draws ``count`` directions in all; by default, this one."""
        return self

    def error(self, size: int, count: int) -> float:
        """Return E‖ĝ − g‖² / ‖g‖² of the mean ĝ = (1/b) Σ ⟨g, v⟩ v, averaged over the orientation of g.

        By default (N − 1)/b, that of independent directions of length √N. A memory takes its step by it.

        Args:
            size: N.
            count: b, at least 1.
        """
        return (size - 1) / count

    def draw(self, key: Key, start: int, stop: int, like: Params) -> Params:
        """Return directions ``start`` to ``stop - 1``, stacked: ``(stop - start, *shape)`` per parameter."""
        reference = max(like.values(), key=lambda value: torch.finfo(value.dtype).bits)
        empty = reference.new_empty(1).expand(tree.numel(like))
        return tree.unflatten(self.flat(key, start, stop, empty), like)
