"""Plain attributes that a loss writes on a module: features it stores, lists it appends to, counters."""

from __future__ import annotations

import numbers
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchmetrics import Metric

from lightning_bilevel.host import LightningModule

_NOT_THE_USERS = {*vars(nn.Module()), *vars(LightningModule()), "fit_context", "_levels", "log", "log_dict"}
_CONTAINERS = (list, deque, dict, set)


class Entry(NamedTuple):
    """An attribute, and what is in it where it is a container."""

    value: Any
    content: Any

    def same(self, other: Entry | None) -> bool:
        """Return whether this is the very thing, with the very things in it, that the other is."""
        if other is None or self.value is not other.value:
            return False
        mine, others = _parts(self.content), _parts(other.content)
        return len(mine) == len(others) and all(a is b for a, b in zip(mine, others, strict=True))


Snapshot = list[dict[str, Entry]]
"""The attributes of every module, by name."""


class Attributes:
    """The attributes of a module and of all below it, but for parameters, buffers, submodules and metrics.

    Args:
        module: the module.

    >>> module = nn.Linear(1, 1)
    >>> module.seen = [1]
    >>> attributes = Attributes(module)
    >>> start = attributes.take()
    >>> module.seen.append(2)
    >>> attributes.put(start)
    >>> module.seen
    [1]
    """

    def __init__(self, module: nn.Module) -> None:
        self._homes = [vars(child) for child in module.modules() if not isinstance(child, Metric)]

    def take(self) -> Snapshot:
        """Return the attributes as they are now, and copies of lists, deques, dicts and sets."""
        return [
            {name: _entry(value) for name, value in home.items() if name not in _NOT_THE_USERS} for home in self._homes
        ]

    def put(self, snapshot: Snapshot) -> None:
        """Put attributes and the content of containers back; what is not in the snapshot goes."""
        for home, entries in zip(self._homes, snapshot, strict=True):
            for name in [name for name in home if name not in _NOT_THE_USERS and name not in entries]:
                del home[name]
            for name, entry in entries.items():
                if not entry.same(_entry(home[name]) if name in home else None):
                    home[name] = entry.value
                    _fill(entry.value, entry.content)


def once(start: Snapshot, before: Snapshot, after: Snapshot) -> Snapshot:
    """Return the attributes that count of an estimate: as if the losses had run once since ``start``.

    What the outer loss appended to, or counted, between ``before`` and ``after`` is appended to, or counted from, what
    was there at the start. Of other attributes the last value counts. Tensors in them are taken out of function
    transforms and off their graphs; episodes that were vectorized are then their first dimension.
    """
    counted: Snapshot = []
    for first, earlier, later in zip(start, before, after, strict=True):
        entries = {}
        for name, entry in later.items():
            if entry.same(first.get(name)):
                entries[name] = entry
            elif name in first and name in earlier and not entry.same(earlier[name]):
                entries[name] = _alive(_since(first[name], earlier[name], entry))
            else:
                entries[name] = _alive(entry)
        counted.append(entries)
    return counted


def _since(first: Entry, earlier: Entry, later: Entry) -> Entry:
    """Return what stood first with the difference between two later moments."""
    same = first.value is earlier.value is later.value
    if same and isinstance(later.value, (list, deque)):
        old, new = list(earlier.content), list(later.content)
        appended = len(new) - len(old)
        if appended >= 0 and all(a is b for a, b in zip(old, new, strict=False)):
            return Entry(later.value, type(later.content)([*first.content, *new[len(old) :]]))
        return later
    counters = [entry.value for entry in (first, earlier, later)]
    if all(isinstance(value, numbers.Number) and not isinstance(value, bool) for value in counters):
        return Entry(counters[0] + (counters[2] - counters[1]), None)
    return later


def _entry(value: Any) -> Entry:
    if isinstance(value, _CONTAINERS):
        return Entry(value, value.copy() if hasattr(value, "copy") else list(value))
    return Entry(value, None)


def _parts(content: Any) -> list[Any]:
    if isinstance(content, dict):
        return [part for pair in content.items() for part in pair]
    return [] if content is None else list(content)


def _fill(container: Any, content: Any) -> None:
    if content is None:
        return
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(content)
    else:
        container.update(content)


def _alive(entry: Entry) -> Entry:
    """Return an entry whose tensors are plain and carry no graph."""
    if entry.content is None:
        return Entry(tree_map(plain, entry.value), None) if isinstance(entry.value, (Tensor, tuple)) else entry
    if isinstance(entry.content, dict):
        return Entry(entry.value, {key: tree_map(plain, value) for key, value in entry.content.items()})
    if isinstance(entry.content, set):
        return entry
    alive = [tree_map(plain, value) for value in entry.content]
    return Entry(entry.value, alive if isinstance(entry.content, list) else deque(alive, entry.content.maxlen))


def plain(value: Any) -> Any:
    """Take a tensor out of function transforms and off its graph; vectorized episodes become its first dimension."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return value
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        dimension = torch._C._functorch.maybe_get_bdim(value)
        value = torch._C._functorch.get_unwrapped(value)
        value = value.movedim(dimension, 0) if dimension > 0 else value
    return value.detach() if value.requires_grad else value
