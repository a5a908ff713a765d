"""Batch hooks: what Lightning calls once per batch is called once per batch of an episode.

``on_before_batch_transfer``, ``transfer_batch_to_device`` and ``on_after_batch_transfer``, of a module or in its place
of a data module, are written for what a plain loader yields, and know of no episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
