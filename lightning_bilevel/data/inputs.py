"""What users hand in, episodes and their batches: the right form, and a word where the wrong one would run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_bilevel.errors import value_error
from lightning_bilevel.host import rank_zero_warn
from lightning_bilevel.problem import Batch, Episode


def some(batches: Sequence[Batch]) -> Sequence[Batch]:
    """Return the inner batches; raise unless they are a list of one or more.

    >>> some(["batch"])
    ['batch']
    """
    if not isinstance(batches, Sequence) or not len(batches):
        got = "none" if isinstance(batches, Sequence) else type(batches).__name__
        raise value_error(
            "Episode(inner=...)",
            "a list of at least one inner batch",
            got,
            "Write a single batch as `[batch]`, and `[None]` where the inner problem has no data.",
        )
    return batches


def outside_inference(value: Any) -> Any:
    """Return a leaf of a batch as autograd takes it: a tensor made under inference mode is copied."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def warn_of_a_bare_batch(batches: Sequence[Batch]) -> None:
    """Warn where ``(x, y)`` stands in the place of ``[(x, y)]``: x would be one inner batch, and y the next.

    >>> warn_of_a_bare_batch([torch.zeros(2), torch.zeros(2)])
    """
    if type(batches) is tuple and len(batches) > 1 and all(isinstance(batch, Tensor) for batch in batches):
        rank_zero_warn(
            f"A tuple of {len(batches)} tensors came as inner batches, and is taken for {len(batches)} of them. Write "
            "one batch as `[(x, y)]`, and batches that are tensors as a list."
        )


def nonfinite(episodes: Sequence[Episode]) -> str | None:
    """Return which batch has a nan or an infinity in it.

    >>> nonfinite([Episode([torch.ones(2), torch.tensor([0.0, torch.nan])], None)])
    'inner batch 2 of 2'
    """
    for episode in episodes:
        named: list[tuple[str, Any]] = [
            (f"inner batch {number} of {len(episode.inner)}", batch) for number, batch in enumerate(episode.inner, 1)
        ]
        for name, batch in [*named, ("outer batch", episode.outer)]:
            for part in tree_leaves(batch):
                if isinstance(part, Tensor) and part.is_floating_point() and not torch.isfinite(part).all():
                    return name
    return None
