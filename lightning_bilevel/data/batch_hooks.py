"""Batch hooks: what Lightning calls once per batch is called once per batch of an episode.

``on_before_batch_transfer``, ``transfer_batch_to_device`` and ``on_after_batch_transfer``, of a module or in its place
of a data module, are written for what a plain loader yields, and know of no episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_bilevel.data.inputs import Batches, as_batches
from lightning_bilevel.data.numbered import NumberedBatch
from lightning_bilevel.problem import Episode


def holds_episodes(batch: Any) -> bool:
    """Return whether this is an episode, a mapping of its two levels, or a list of episodes.

    >>> holds_episodes([Episode([1], 2)]), holds_episodes({"inner": 1, "outer": 2}), holds_episodes([1, 2])
    (True, True, False)
    """
    if isinstance(batch, Episode) or (isinstance(batch, Mapping) and set(batch) == {"inner", "outer"}):
        return True
    if not isinstance(batch, (list, tuple)) or not batch:
        return False
    return all(issubclass(kind, Episode) for kind in set(map(type, batch)))


def each_batch(episodes: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to every batch of what :func:`holds_episodes`; a numbered one keeps its number.

    >>> each_batch([Episode(inner=[1, 2], outer=3)], lambda batch: 10 * batch)
    [Episode(inner=[10, 20], outer=30)]
    """

    def applied(batch: Any) -> Any:
        if isinstance(batch, NumberedBatch):
            return batch._replace(batch=function(batch.batch))
        return function(batch)

    if isinstance(episodes, Episode):
        inner = as_batches(episodes.inner)
        kind = Batches if isinstance(inner, Batches) else list
        return Episode(kind(map(applied, inner)), applied(episodes.outer))
    if isinstance(episodes, Mapping):
        return {level: applied(batch) for level, batch in episodes.items()}
    return [each_batch(episode, function) for episode in episodes]


def settled(batch: Any, device: torch.device) -> Any:
    """Return a batch that is on a device as Lightning's transfer hands it out: the tensors, in containers of their own.

    Lightning asks each part for all that it might be, which takes longer than a tenth of a meta-step of 25 small tasks.

    Returns:
        ``None`` where something is elsewhere, or is neither a tensor, a number, a text nor in a plain container.

    >>> cpu = torch.device("cpu")
    >>> settled([Episode([1.5], torch.ones(1))], cpu), settled(torch.ones(1), torch.device("meta")) is None
    ([Episode(inner=[1.5], outer=tensor([1.]))], True)
    """
    try:
        return _settled(batch, device)
    except _Other:
        return None


class _Other(Exception):
    """A part that has to be moved, or of which that is not known."""


_AS_THEY_ARE = {int, float, bool, complex, str, bytes, type(None)}


def _settled(value: Any, device: torch.device) -> Any:
    kind = type(value)
    if kind is Tensor:
        if value.device != device:
            raise _Other
        return value
    if kind is Episode or kind is NumberedBatch:
        return kind(*(_settled(part, device) for part in value))
    if kind is list or kind is tuple or kind is Batches:
        return kind([_settled(part, device) for part in value])
    if kind is dict:
        return {key: _settled(part, device) for key, part in value.items()}
    if kind not in _AS_THEY_ARE:
        raise _Other
    return value
