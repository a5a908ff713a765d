"""Notes on errors out of a user's losses: of which level, in which inner step, on what batch."""

from __future__ import annotations

from typing import Any

import torch

from lightning_bilevel.errors import add_note
from lightning_bilevel.problem import Batch
from lightning_bilevel.stacking import described, leaves_in


class Whereabouts:
    """Knows how far an inner run has come, for what a loss raises on its way.

    Args:
        owner: name of the module's class.

    >>> run = Whereabouts("Net")
    >>> run.took(step=1)
    >>> run.note(error := ValueError("no"), "inner", {"x": torch.ones(2, 3)}, torch.float32)
    >>> print(*getattr(error, "__notes__", [str(error)]))
    In the inner loss of `Net`, in inner step 2, on {x: float32 (2, 3)}.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._before: int | None = 0
        self._taken = 0

    def begin(self) -> None:
        """Begin a run."""
        self._before, self._taken = None, 0

    def took(self, step: Any) -> None:
        """Note the number of a step, from 1, or from where a warm run has come to; a traced one is no number."""
        if not isinstance(step, int):
            return
        if self._before is None:
            self._before = step - 1
        self._taken = step - self._before

    def note(self, error: Exception, level: str, batch: Batch, dtype: torch.dtype) -> None:
        """Add to an error where it was raised.

        Args:
            error: out of a loss.
            level: ``"inner"`` or ``"outer"``.
            batch: what the loss was given.
            dtype: of the parameters.
        """
        when = f"in inner step {self._taken + 1}" if level == "inner" else f"after {self._taken} inner steps"
        add_note(error, f"In the {level} loss of `{self._owner}`, {when}, on {described(batch)}.{_hint(batch, dtype)}")


def _hint(batch: Batch, dtype: torch.dtype) -> str:
    """Return what is unusual in a batch, as a sentence."""
    leaves = list(leaves_in(batch))
    if words := [leaf for leaf in leaves if isinstance(leaf, str)]:
        return f" It has words, such as {words[0]!r}: losses compute with numbers."
    others = {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()} - {dtype}
    if not others:
        return ""
    other = str(others.pop()).removeprefix("torch.")
    return f" It has {other}, and the parameters are {str(dtype).removeprefix('torch.')}: convert one of them."
