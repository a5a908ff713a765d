"""Batches that come again: which of how many a batch is, for strategies that remember something of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch.utils._pytree import register_pytree_node
from torch.utils.data._utils.collate import default_collate_fn_map

from lightning_bilevel.errors import value_error
from lightning_bilevel.problem import Batch, Episode


class Place(NamedTuple):
    """Which batch it is.

    Attributes:
        number: i, from 0.
        of: n, the number of batches in all.

    >>> Place(number=0, of=2)
    Place(number=0, of=2)
    """

    number: int
    of: int


class NumberedBatch(NamedTuple):
    """A batch that comes again, and which of how many it is; losses get the batch alone.

    It may stand wherever a batch does: in an :class:`~lightning_bilevel.Episode`, in a loader with ``batch_size=None``.

    Attributes:
        batch: the batch.
        number: i, from 0.
        of: n, the number of batches in all.

    >>> NumberedBatch("first", number=0, of=2).batch
    'first'
    """

    batch: Batch
    number: int
    of: int


def numbered(batches: Iterable[Batch]) -> list[NumberedBatch]:
    """Return all batches of a loader, numbered, for strategies that keep a row for each: ``SOBA(momentum="table")``.

    The loader is gone through once, and what it yields then are the batches from now on: the same examples under the
    same number. So their order may be shuffled, and what is in them may not. Number alike in every process, and in a
    fit that goes on from a checkpoint. All batches are held in memory; a data set of your own whose items are
    :class:`NumberedBatch` does without.

    Args:
        batches: a ``DataLoader``, a list of batches, or what else ends.

    Raises:
        ValueError: no batch.

    >>> from torch.utils.data import DataLoader
    >>> from lightning_bilevel import EpisodeLoader
    >>> inner, outer = numbered(DataLoader(range(6), batch_size=2)), numbered(["all"])
    >>> shuffled = DataLoader(inner, batch_size=None, shuffle=True)
    >>> episodes = EpisodeLoader(shuffled, outer, inner_batches=3)
    >>> sorted(next(iter(episodes)).inner, key=lambda each: each.number)[2]
    NumberedBatch(batch=tensor([4, 5]), number=2, of=3)
    """
    found = list(batches)
    if not found:
        raise value_error("numbered(batches)", "a loader of one or more batches", 0)
    return [NumberedBatch(batch, number, len(found)) for number, batch in enumerate(found)]


class PlacedBatches(list[Batch]):
    """The plain inner batches of an episode, with the places of all its batches, as far as they were numbered.

    What makes a list anew, as Lightning does to move a batch, drops the places: they are for episodes that are there.

    Args:
        batches: inner batches.
        inner: the place of each; default: unknown.
        outer: that of the outer batch.

    >>> batches = PlacedBatches(["a"], [Place(1, 3)])
    >>> batches, batches.inner
    (['a'], (Place(number=1, of=3),))
    """

    def __init__(
        self, batches: Iterable[Batch] = (), inner: Sequence[Place | None] = (), outer: Place | None = None
    ) -> None:
        super().__init__(batches)
        self.inner, self.outer = tuple(inner) or (None,) * len(self), outer


# torch's trees know lists, not what derives from them.
register_pytree_node(
    PlacedBatches,
    lambda batches: (list(batches), (batches.inner, batches.outer)),
    lambda batches, places: PlacedBatches(batches, *places),
)


def plain(batch: Batch) -> Batch:
    """Return a batch without its number.

    >>> plain(NumberedBatch("first", 0, 2)), plain("any")
    ('first', 'any')
    """
    return batch.batch if isinstance(batch, NumberedBatch) else batch


def placed(batches: list[Batch], given: Sequence[Batch], outer: Batch) -> list[Batch]:
    """Return the plain inner batches of an episode with the places that it was given, if it was given any.

    Args:
        batches: plain ones.
        given: the same, as they were handed in.
        outer: the outer batch, as it was handed in.

    Raises:
        ValueError: a number that is none.

    >>> placed(["a"], [NumberedBatch("a", 1, 3)], "b").inner
    (Place(number=1, of=3),)
    """
    if isinstance(given, PlacedBatches):
        return PlacedBatches(batches, given.inner, given.outer)
    inner, judge = [_place(batch) for batch in given], _place(outer)
    return PlacedBatches(batches, inner, judge) if judge is not None or any(inner) else batches


def with_numbers(episode: Episode) -> Episode:
    """Return a checked episode as a loader yields it: batches with numbers, which outlive collating and moving.

    >>> with_numbers(Episode(PlacedBatches(["a"], [Place(1, 3)]), "b"))
    Episode(inner=[NumberedBatch(batch='a', number=1, of=3)], outer='b')
    """
    inner, outer = places_of(episode)
    pairs = zip([*episode.inner, episode.outer], [*inner, outer], strict=True)
    batches = [batch if place is None else NumberedBatch(batch, *place) for batch, place in pairs]
    return Episode(batches[:-1], batches[-1])


def places_of(episode: Episode) -> tuple[tuple[Place | None, ...], Place | None]:
    """Return the places of the inner batches and of the outer batch of a checked episode, ``None`` where unknown.

    >>> places_of(Episode(["a"], "b"))
    ((None,), None)
    """
    if isinstance(episode.inner, PlacedBatches):
        return episode.inner.inner, episode.inner.outer
    return (None,) * len(episode.inner), None


def _place(batch: Batch) -> Place | None:
    if not isinstance(batch, NumberedBatch):
        return None
    _, number, of = batch
    if type(number) is not int or type(of) is not int or not 0 <= number < of:
        raise value_error("NumberedBatch(number=..., of=...)", "integers with 0 ≤ number < of", (number, of), _ALONE)
    return Place(number, of)


_ALONE = "Items are batches already: `DataLoader(numbered(...), batch_size=None)`."


def _refuse_to_collate(batches: Sequence[NumberedBatch], *, collate_fn_map: Any = None) -> Any:
    expected = "None for a data set of numbered batches"
    raise value_error("DataLoader(batch_size=...)", expected, len(batches), _ALONE)


default_collate_fn_map[NumberedBatch] = _refuse_to_collate
