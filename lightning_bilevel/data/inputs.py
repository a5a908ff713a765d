"""Checks of episodes and batches, with warnings for forms that run but mean something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_bilevel.errors import value_error
from lightning_bilevel.host import rank_zero_warn
from lightning_bilevel.problem import Batch, Episode
from lightning_bilevel.stacking import replaced, tensors_in


def check_episodes(episodes: Sequence[Episode], owner: str) -> list[Episode]:
    """Return the episodes of a batch as an estimate takes them; the one check of all that users hand in.

    Args:
        episodes: what ``episodes(batch)`` of a module returned.
        owner: name of the module's class.

    Raises:
        ValueError: no episode, or one without a list of inner batches.
    """
    if not episodes:
        raise value_error(f"{owner}.episodes(batch)", "at least one episode", [], "Look at the loader.")
    return [Episode(check_inner_batches(episode.inner), _usable(episode.outer)) for episode in episodes]


def check_inner_batches(batches: Sequence[Batch]) -> list[Batch]:
    """Return the inner batches as a list; raise unless they are a list of one or more.

    Warns where ``(x, y)`` stands in the place of ``[(x, y)]``: x would be one inner batch, and y the next.

    >>> check_inner_batches(["batch"])
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
    if type(batches) is tuple and len(batches) > 1 and all(isinstance(batch, Tensor) for batch in batches):
        rank_zero_warn(
            f"A tuple of {len(batches)} tensors came as inner batches, and is taken for {len(batches)} of them. Write "
            "one batch as `[(x, y)]`, and batches that are tensors as a list."
        )
    return [_usable(batch) for batch in batches]


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
            for part in tensors_in(batch):
                if part.is_floating_point() and not torch.isfinite(part).all():
                    return name
    return None


def _usable(batch: Batch) -> Batch:
    """Return a batch as autograd takes it: tensors made under inference mode are copied."""
    parts = batch if type(batch) in (tuple, list) else [batch]
    try:
        inference = any(map(Tensor.is_inference, parts))  # in a tenth of the time of looking for leaves
    except TypeError:
        inference = any(part.is_inference() for part in tensors_in(batch))
    return replaced(batch, Tensor.clone) if inference else batch
