"""Checks of episodes and batches: one batch or a list of them, refused or warned of where that cannot be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from lightning_bilevel.data.numbered import placed, plain
from lightning_bilevel.errors import value_error
from lightning_bilevel.host import rank_zero_warn
from lightning_bilevel.problem import Batch, Episode
from lightning_bilevel.stacking import described, replaced, tensors_in


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
    return [_checked(episode) for episode in episodes]


def _checked(episode: Episode) -> Episode:
    given, outer = as_batches(episode.inner), plain(episode.outer)
    inner = check_inner_batches(given)
    if type(outer) in (list, tuple) and outer:
        if type(episode.inner) is not Batches:
            warn_of_parts(inner, parts(outer), "the outer batch")
        if len(outer) == 1 and parts(outer[0]) == parts(inner[0]) and _is_bare(outer[0]) == _is_bare(inner[0]):
            rank_zero_warn(
                "`Episode(outer=...)` is a list of one entry, which looks like an inner batch. There is one outer "
                "batch: write `Episode(inner=[batch], outer=batch)`, without brackets."
            )
    return Episode(placed(inner, given, episode.outer), _usable(outer))


class Batches(list[Batch]):
    """Inner batches that a loader has counted out: whatever they are, none of them is a part of a batch.

    >>> Batches([1, 2])
    [1, 2]
    """


# torch's trees know lists, not what derives from them.
register_pytree_node(Batches, lambda batches: (list(batches), None), lambda batches, _: Batches(batches))


def check_inner_batches(batches: Any) -> list[Batch]:
    """Return the inner batches as a list of one or more.

    What cannot be a list of batches, a mapping, a ``NamedTuple``, an instance of a dataclass, an object with ``to`` as
    of torch_geometric, is one batch.

    Raises:
        ValueError: neither; or tensors that may be the parts of one batch, as a ``DataLoader`` yields ``[x, y]``, and
            would be taken for a batch each.

    >>> check_inner_batches(["batch"]), check_inner_batches({"x": 1, "y": 2})
    (['batch'], [{'x': 1, 'y': 2}])
    """
    if type(batches) is list and len(batches) == 1:  # whatever the one is: most are, and every episode comes by here
        return [_usable(plain(batches[0]))]
    batches = as_batches(batches)
    if not isinstance(batches, Sequence) or isinstance(batches, str) or not len(batches):
        got = "none" if isinstance(batches, Sequence) and not len(batches) else type(batches).__name__
        raise value_error(
            "Episode(inner=...)",
            "a list of at least one inner batch",
            got,
            "Write a single batch as `[batch]`, and `[None]` where the inner problem has no data.",
        )
    check_no_batch("Episode(inner=...)", batches, "inner batches")
    return [_usable(plain(batch)) for batch in batches]


def as_batches(batches: Any) -> Any:
    """Return inner batches as they came, or a list of what can only be one.

    Raises:
        ValueError: an episode.
    """
    if isinstance(batches, Episode):
        hint = "Write `episode.inner`."
        raise value_error("Episode(inner=...)", "a list of inner batches", "Episode", hint)
    return [batches] if _is_one(batches) else batches


def check_no_batch(what: str, batches: Sequence[Any], plural: str) -> None:
    """Refuse a list that may be one batch in several parts; warn of a tuple of tensors, and take it for several.

    Args:
        what: the argument as the user writes it.
        batches: at least one.
        plural: what they are taken for.

    Raises:
        ValueError: two entries or more of which some are bare tensors or arrays, and they are not all alike.

    >>> check_no_batch("adapted(...)", [torch.ones(2, 3), torch.ones(2)], "batches")
    Traceback (most recent call last):
    lightning_bilevel.errors.ArgumentError: Expected `adapted(...)` to be a list of batches, got 'float32 (2, 3),
    float32 (2)'. Is it one batch? Write it in brackets: `[[a, b]]`. Are they 2 batches? Write each in brackets of its
    own, `[[a], [b]]`, and take it out of them in the loss.
    """
    if len(batches) < 2 or type(batches) is Batches or not any(map(_is_bare, batches)):
        return
    if not _of_one_loader(batches):
        one, each = _letters(len(batches), "", ""), _letters(len(batches), "[", "]")
        raise value_error(
            what,
            f"a list of {plural}",
            ", ".join(map(described, batches)),
            f"Is it one batch? Write it in brackets: `[[{one}]]`. Are they {len(batches)} batches? Write each in "
            f"brackets of its own, `[{each}]`, and take it out of them in the loss.",
        )
    if type(batches) is tuple:
        rank_zero_warn(
            f"A tuple of {len(batches)} tensors came as {plural}, and is taken for {len(batches)} of them. Write "
            "one batch as `[(x, y)]`, and batches that are tensors as a list."
        )


def parts(batch: Batch) -> int:
    """Return of how many parts a batch is a list or a tuple; 0 of what is none.

    >>> parts(("x", "y")), parts("x")
    (2, 0)
    """
    return len(batch) if type(batch) in (list, tuple) else 0


def warn_of_parts(batches: Sequence[Batch], expected: int, like: str) -> None:
    """Warn of tensors, each a batch, that are as many as the parts of another batch: they may be those of one.

    Args:
        batches: inner batches.
        expected: :func:`parts` of the other batch.
        like: which one that is.
    """
    if len(batches) == expected > 1 and all(map(_is_bare, batches)):
        rank_zero_warn(
            f"{expected} tensors came as {expected} inner batches, and {like} is a list of {expected} parts. If they "
            f"are one batch, write it in brackets: `[[{_letters(expected, '', '')}]]`."
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


def _is_one(batches: Any) -> bool:
    """Return whether this is a batch rather than several; of a tensor that cannot be told."""
    if isinstance(batches, (list, Tensor, str, type(None))) or type(batches) is tuple:
        return False
    named = isinstance(batches, Mapping) or hasattr(batches, "_fields") or is_dataclass(batches)
    return not isinstance(batches, type) and (named or callable(getattr(batches, "to", None)))


def _is_bare(batch: Any) -> bool:
    """Return whether a batch is a tensor, or an array, by itself."""
    return isinstance(batch, Tensor) or (hasattr(batch, "shape") and hasattr(batch, "dtype"))


def _of_one_loader(batches: Sequence[Any]) -> bool:
    """Return whether a loader may have yielded tensors: they are alike, but for the number of their rows."""
    if not all(map(_is_bare, batches)):
        return False
    if any(getattr(batch, "is_nested", False) for batch in batches):  # some have no shape
        return True
    first, *others = [(batch.dtype, tuple(batch.shape)) for batch in batches]
    rows = len(first[1]) > 1
    return all((dtype, shape[rows:]) == (first[0], first[1][rows:]) for dtype, shape in others)


def _letters(count: int, left: str, right: str) -> str:
    shown = [f"{left}{letter}{right}" for letter in "abcd"[:count]]
    return ", ".join(shown if count <= 4 else [*shown[:2], "..."])
