"""The interface of a direction sampler, and the keys that make directions repeatable."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.tree import Params


@dataclass(frozen=True)
class Key:
    """Names one estimate, so that its random directions can be drawn again anywhere.

    Attributes:
        seed: the user's seed.
        estimate: how many estimates the strategy made before this one.
        episode: position of the episode within the batch.
        rank: the process, where each process draws its own directions; 0 otherwise.
        share: (i, n): evaluate the i-th of n shares of the directions.
        step: optimizer steps taken so far; does not change what is drawn.

    >>> first, again = (torch.rand(2, generator=Key(seed=1).generator(7)) for _ in range(2))
    >>> torch.equal(first, again)
    True
    """

    seed: int = 0
    estimate: int = 0
    episode: int = 0
    rank: int = 0
    share: tuple[int, int] = (0, 1)
    step: int = 0

    def bounds(self, count: int) -> tuple[int, int]:
        """Return the range of direction numbers that is this key's share of ``range(count)``.

        >>> [Key(share=(i, 3)).bounds(8) for i in range(3)]
        [(0, 3), (3, 6), (6, 8)]
        """
        part, parts = self.share
        size, extra = divmod(count, parts)
        start = part * size + min(part, extra)
        return start, start + size + (part < extra)

    @property
    def masks(self) -> int:
        """The seed of what the losses draw themselves, such as dropout masks."""
        return self.generator(-1).initial_seed()

    def generator(self, index: int, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a fresh generator for the direction with global number ``index``."""
        words = (self.seed, self.estimate, self.episode, self.rank, index)
        digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class DirectionSampler(ABC):
    """Draws random directions v over all outer parameters jointly, with E[v vᵀ] = I.

    A direction is a pure function of its key and its global number: it is drawn again rather
    than stored, and one process draws the same directions as many. How the range of numbers
    is cut into calls must not change what is drawn, beyond rounding.

    >>> class Axis(DirectionSampler):
    ...     def flat(self, key, start, stop, like):
    ...         axes = [torch.randint(len(like), (1,), generator=key.generator(i)) for i in range(start, stop)]
    ...         return len(like) ** 0.5 * torch.eye(len(like), dtype=like.dtype)[torch.cat(axes)]
    >>> Axis().flat(Key(seed=1), 0, 2, torch.zeros(4)).norm(dim=1)
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

    def draw(self, key: Key, start: int, stop: int, like: Params) -> Params:
        """Return directions ``start`` to ``stop - 1``, stacked: ``(stop - start, *shape)`` per parameter."""
        reference = max(like.values(), key=lambda value: torch.finfo(value.dtype).bits)
        empty = reference.new_empty(1).expand(tree.numel(like))
        return tree.unflatten(self.flat(key, start, stop, empty), like)
