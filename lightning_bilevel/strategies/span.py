"""Orthonormal directions, made out of vectors one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.tree import Params

DEPENDENT = 1e-3
"""Part of a vector's length below which what is new in it is taken for rounding."""


class Span:
    """The span of named vectors, as orthonormal directions in the order in which the vectors came.

    Args:
        like: a tree of the names, shapes and dtypes of the directions.
        room: the most directions; memory for so many is taken at once, and no more later.

    >>> span = Span({"w": torch.zeros(2)}, room=2)
    >>> for name, vector in (("a", [0.0, 4.0]), ("b", [0.0, 1.0]), ("c", [3.0, 0.0])):
    ...     length = span.add(name, {"w": torch.tensor(vector)})
    >>> span.named()
    {'a': {'w': tensor([0., 1.])}, 'c': {'w': tensor([1., 0.])}}
    """

    def __init__(self, like: Params, room: int) -> None:
        self._rows = {name: value.new_empty(room, *value.shape) for name, value in like.items()}
        self._room, self._names = room, list[str]()

    def add(self, name: str, vector: Params) -> Tensor:
        """Take in a direction for what is new in a vector, if there is room and the vector has a length; return it.

        Two passes of Gram–Schmidt: what one leaves by rounding, the other takes away.
        """
        vector = wide(vector)
        length = tree.norm(vector)
        if len(self._names) == self._room or not (torch.isfinite(length) and length > 0):
            return length
        vector = tree.scale(vector, 1 / length)
        for row in 2 * list(self.named().values()):
            vector = tree.add(vector, row, alpha=-tree.dot(row, vector))
        rest = tree.norm(vector)
        if rest > DEPENDENT:
            for key, value in tree.scale(vector, 1 / rest).items():
                self._rows[key][len(self._names)].copy_(value)
            self._names.append(name)
        return length

    def named(self) -> dict[str, Params]:
        """Return the directions by the names of their vectors, as views."""
        return {name: tree.index(self._rows, number) for number, name in enumerate(self._names)}

    def stacked(self) -> Params | None:
        """Return the directions stacked, ``(k, *shape)`` per tensor, as views; ``None`` if there are none."""
        return tree.map(lambda rows: rows[: len(self._names)], self._rows) if self._names else None


def wide(vector: Params) -> Params:
    """Return a tree at least in float32; tensors that are stay as they are.

    >>> wide({"w": torch.ones(1, dtype=torch.bfloat16)})
    {'w': tensor([1.])}
    """
    return {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in vector.items()}
