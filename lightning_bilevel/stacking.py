"""Batches in containers: which of them are stacked over episodes, what tensors they hold, one call on a stack.

A container is a tuple or a ``NamedTuple``, a list, a dict or a ``UserDict`` (such as the ``BatchEncoding`` of
transformers), or an instance of a dataclass; ``None`` is an empty one. What else a batch holds, or has as an attribute
beside its entries, cannot be stacked.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import (
    _add_batch_dim,
    _remove_batch_dim,
    _vmap_decrement_nesting,
    _vmap_increment_nesting,
)
from torch._functorch.vmap import lazy_load_decompositions  # type: ignore[attr-defined]
from torch.utils._pytree import tree_leaves, tree_map

_PLAIN = (str, bytes, int, float, complex, torch.dtype, torch.device)
_WHOLE = (Tensor, str, int, float)
"""Types of what can be in a batch and has nothing to copy in it."""


def alike(a: Any, b: Any) -> bool:
    """Return whether two batches have the same structure, shapes and dtypes, so that they can be stacked.

    >>> alike({"x": torch.ones(2)}, {"x": torch.zeros(2)}), alike([torch.ones(2)], [torch.ones(3)]), alike(1, 1)
    (True, False, False)
    """
    # By hand rather than by torch's pytree: this walks every episode of every step, and is several times faster. So are
    # plain types: to ask whether a list is a `UserDict`, an abstract class, takes as long as the rest.
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.is_nested or b.is_nested:  # those of the old layout have no shape
            return False
        return a.shape == b.shape and a.dtype == b.dtype
    kind = type(a)
    if kind is not type(b):
        return False
    if kind is tuple or kind is list:
        return len(a) == len(b) and all(map(alike, a, b))
    if a is None:
        return True
    names = _names(a)
    if kind is not dict and not _same_besides(names, a, b):
        return False
    if isinstance(a, (dict, UserDict)):
        return a.keys() == b.keys() and all(alike(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return names is not None and all(alike(getattr(a, name), getattr(b, name)) for name in names)


def stacked(values: Sequence[Any]) -> Any:
    """Stack the tensors of :func:`alike` batches along a new first dimension.

    >>> stacked([{"x": torch.tensor(1.0)}, {"x": torch.tensor(2.0)}])
    {'x': tensor([1., 2.])}
    """
    first = values[0]
    if isinstance(first, Tensor):
        return torch.stack(list(values))
    if type(first) in (list, tuple):
        return type(first)(map(stacked, zip(*values, strict=True)))
    return _filled(first, [stacked(column) for column in zip(*map(_entries, values), strict=True)])


def vectorized(fn: Callable[..., Any], *args: Any, randomness: str) -> Any:
    """Return ``vmap(fn, randomness=randomness)(*args)`` for arguments and results that are tensors in containers.

    The public ``vmap`` walks nested arguments and results several times, as long as the loss of a small net takes. This
    is its core, with one walk for each.

    >>> vectorized(lambda batch: (batch["x"].sum(), {}), {"x": torch.eye(2)}, randomness="same")
    (tensor([1., 1.]), {})
    """
    tensors: list[Tensor] = []
    _collect(args, tensors)
    count = tensors[0].shape[0]
    if any(tensor.shape[0] != count for tensor in tensors):  # which would be broadcast
        raise ValueError(f"Expected a stack to have {count} of each tensor, got {[len(each) for each in tensors]}.")
    lazy_load_decompositions()  # of forward mode, once
    level = _vmap_increment_nesting(count, randomness)
    try:
        result = fn(*_rebuilt(args, iter([_add_batch_dim(tensor, 0, level) for tensor in tensors])))
        found: list[Tensor] = []
        _collect(result, found)
        return _rebuilt(result, iter([_remove_batch_dim(tensor, level, count, 0) for tensor in found]))
    finally:
        _vmap_decrement_nesting()


@contextmanager
def nested(count: int, randomness: str) -> Iterator[int]:
    """Enter a ``vmap`` over ``count`` copies by hand, as :func:`vectorized` does; yield its level."""
    level = _vmap_increment_nesting(count, randomness)
    try:
        yield level
    finally:
        _vmap_decrement_nesting()


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch: those in containers, and in what is registered with torch's pytree.

    >>> len(list(tensors_in(UserDict(x=[torch.ones(2), "a"], y=torch.ones(1)))))
    2
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            yield leaf
        elif (entries := _entries(leaf)) is not None:
            yield from tensors_in(list(entries))


def leaves_in(batch: Any) -> Iterator[Any]:
    """Yield what a batch has in its containers, tensors or not.

    >>> list(leaves_in(UserDict(x=[1, "a"], y=2)))
    [1, 'a', 2]
    """
    entries = _entries(batch)
    if entries is None:
        yield batch
    else:
        for entry in entries:
            yield from leaves_in(entry)


def described(batch: Any) -> str:
    """Return what a batch is, in a few words: containers with what is in them, dtypes and shapes.

    >>> described((torch.ones(5, 3), {"y": torch.arange(5), "names": ["a", "b", "c", "d", "e"]}))
    '(float32 (5, 3), {y: int64 (5), names: [str, str, str, ...]})'
    """
    if hasattr(batch, "shape") and hasattr(batch, "dtype"):
        shape = () if getattr(batch, "is_nested", False) else batch.shape
        return f"{str(batch.dtype).removeprefix('torch.')} ({', '.join(map(str, shape))})"
    left, right = ("(", ")") if type(batch) is tuple else ("[", "]") if type(batch) is list else ("{", "}")
    if isinstance(batch, (dict, UserDict)):
        parts = [f"{key}: {described(value)}" for key, value in batch.items()]
    elif type(batch) in (tuple, list):
        parts = [described(part) for part in batch]
    else:
        return "None" if batch is None else type(batch).__name__
    return f"{left}{', '.join(parts if len(parts) <= 4 else [*parts[:3], '...'])}{right}"


def copied(batch: Any, tensors: bool = False) -> Any:
    """Return a batch whose containers, and objects of other kinds, may be written to: copies, with the same in them.

    Args:
        batch: anything.
        tensors: whether its tensors are copied, too.

    >>> batch = {"x": torch.ones(2)}
    >>> written = copied(batch)
    >>> written["y"] = written.pop("x")
    >>> list(batch), written["y"] is batch["x"]
    (['x'], True)
    """
    if isinstance(batch, Tensor):
        return batch.clone() if tensors else batch
    kind = type(batch)
    if kind is tuple or kind is list:
        # Most batches, and as many words as there are examples, are done in a moment.
        if not tensors and all([type(part) in _WHOLE for part in batch]):
            return kind(batch)
        return kind([copied(part, tensors) for part in batch])
    if kind is dict:
        return {key: copied(part, tensors) for key, part in batch.items()}
    entries = _entries(batch)
    if entries is not None:
        return _filled(batch, [copied(entry, tensors) for entry in entries])
    if tensors:  # also those in what torch's trees know
        batch = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
    if not hasattr(batch, "__dict__") or callable(batch):
        return batch
    try:
        return copy.copy(batch)
    except Exception:  # not every object can be copied
        return batch


def replaced(batch: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch with ``fn`` of each tensor that :func:`tensors_in` yields in its place.

    >>> replaced([torch.ones(2), UserDict(x=torch.ones(1))], torch.neg)
    [tensor([-1., -1.]), {'x': tensor([-1.])}]
    """

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return fn(leaf)
        entries = _entries(leaf)
        return leaf if entries is None else _filled(leaf, [replaced(entry, fn) for entry in entries])

    return tree_map(of_leaf, batch)


class Flat(NamedTuple):
    """A batch taken apart.

    Attributes:
        tensors: in the order of :func:`tensors_in`.
        rest: all else about the batch, and shape, dtype and device of each tensor; equal where two batches differ in
            the numbers in their tensors only. ``None`` where that cannot be said, for the batch holds something else
            than containers, numbers and texts.
    """

    tensors: list[Tensor]
    rest: Hashable


def flattened(batch: Any) -> Flat:
    """Take a batch apart.

    >>> flattened({"x": torch.ones(2), "n": 3}).rest == flattened({"x": torch.zeros(2), "n": 3}).rest
    True
    """
    tensors = list(tensors_in(batch))
    try:
        found = _rest(batch)
    except TypeError:
        return Flat(tensors, None)
    return Flat(tensors, found)


def _rest(value: Any) -> Hashable:
    if type(value) in (Tensor, nn.Parameter):
        if value.layout is not torch.strided:
            raise TypeError
        return value.shape, value.dtype, value.device
    if value is None or isinstance(value, _PLAIN):
        return type(value), repr(value)  # which tells 0.0 from -0.0
    if isinstance(value, Tensor) or (entries := _entries(value)) is None:
        raise TypeError
    keys = tuple(value) if isinstance(value, (dict, UserDict)) else ()
    counted = {"data"} if isinstance(value, UserDict) else set(_names(value) or ())
    besides = {name: each for name, each in getattr(value, "__dict__", {}).items() if name not in counted}
    if not all(each is None or isinstance(each, _PLAIN) for each in besides.values()):
        raise TypeError
    return type(value), keys, tuple(map(_rest, entries)), tuple((name, _rest(each)) for name, each in besides.items())


def _names(value: Any) -> tuple[str, ...] | None:
    """Return the fields of an instance of a dataclass, which is no other container."""
    if isinstance(value, (dict, list, tuple, UserDict)) or not is_dataclass(value) or isinstance(value, type):
        return None
    return tuple(field.name for field in fields(value))


def _entries(value: Any) -> Any:
    """Return what is in a container; ``None`` for anything else."""
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, dict):
        return value.values()
    if value is None:
        return ()
    if isinstance(value, UserDict):
        return value.values()
    names = _names(value)
    return None if names is None else [getattr(value, name) for name in names]


def _same_besides(names: Sequence[str] | None, a: Any, b: Any) -> bool:
    """Return whether two containers of one type have the same attributes besides their entries."""
    ours, others = getattr(a, "__dict__", {}), getattr(b, "__dict__", {})
    entries = {"data"} if isinstance(a, UserDict) else set(names or ())
    return ours.keys() == others.keys() and all(
        name in entries or value is others[name] or (isinstance(value, (str, int, float)) and value == others[name])
        for name, value in ours.items()
    )


def _filled(like: Any, parts: list[Any]) -> Any:
    """Return a container like this one with ``parts`` in it."""
    kind = type(like)
    if kind is dict:
        return dict(zip(like, parts, strict=True))
    if like is None:
        return None
    if isinstance(like, (list, tuple)):
        return kind(*parts) if hasattr(like, "_fields") else kind(parts)
    filled = copy.copy(like)
    if isinstance(like, (dict, UserDict)):
        for key, part in zip(like, parts, strict=True):
            filled[key] = part
    else:
        for name, part in zip(_names(like) or (), parts, strict=True):
            object.__setattr__(filled, name, part)  # a frozen one refuses its own; nothing checks what vmap passes
    return filled


def _collect(value: Any, tensors: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors.append(value)
    else:
        for part in _entries(value):
            _collect(part, tensors)


def _rebuilt(like: Any, tensors: Iterator[Tensor]) -> Any:
    """Return ``like`` with its tensors replaced, in the order of :func:`_collect`."""
    if isinstance(like, Tensor):
        return next(tensors)
    if type(like) is dict:
        return {key: _rebuilt(part, tensors) for key, part in like.items()}
    if type(like) in (list, tuple):
        return type(like)([_rebuilt(part, tensors) for part in like])
    return _filled(like, [_rebuilt(part, tensors) for part in _entries(like)])
