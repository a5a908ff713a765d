"""Plain attributes that a loss writes on a module: features it stores, lists it appends to, counters."""

from __future__ import annotations

import numbers
import sys
from collections import UserDict, UserList, deque
from functools import lru_cache
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_bilevel.generators import is_others
from lightning_bilevel.host import LightningModule
from lightning_bilevel.modules.metrics import unwrapped, usable
from lightning_bilevel.modules.parts import parts

_NOT_THE_USERS = {*vars(nn.Module()), *vars(LightningModule()), "fit_context", "_levels", "log", "log_dict"}
_CONTAINERS = (list, deque, dict, set)
_LEAVES = (Tensor, str, bytes, int, float, complex, type(None))
_ATOMS = {int, float, bool, str, type(None), Tensor}
"""The types of most attributes, which hold nothing."""


_DEPTH, _WIDTH = 4, 1_000
"""How far into containers of containers attributes are followed; a longer one is data."""


class Entry(NamedTuple):
    """An attribute, and what is in it where it is a container.

    Attributes:
        value: the attribute.
        content: a copy of it, or of the attributes of an object of the user's; ``None`` of anything else.
        inside: the containers in it, each with a copy, at all depths.
        version: of a tensor, how often it was written to.
    """

    value: Any
    content: Any
    inside: tuple[tuple[Any, Any], ...] = ()
    version: int = 0

    @property
    def fixed(self) -> bool:
        """Whether it stays what it is while the attribute is the same thing."""
        return self.content is None and not self.inside and not isinstance(self.value, (Tensor, tuple))

    def same(self, other: Entry | None) -> bool:
        """Return whether this is the very thing, with the very things in it, that the other is."""
        if other is None or self.value is not other.value or len(self.inside) != len(other.inside):
            return False
        if self.content is None is other.content and not self.inside:
            return True
        pairs = [(self.content, other.content)]
        for (mine, content), (theirs, others) in zip(self.inside, other.inside, strict=True):
            if mine is not theirs:
                return False
            pairs.append((content, others))
        return all(map(_same_parts, *zip(*pairs, strict=True)))

    def stands(self) -> bool:
        """Return whether nothing has been written to the thing, nor to what is in it."""
        if isinstance(self.value, Tensor):
            return self.version == _version(self.value)
        return all(_holds(container, content) for container, content in ((self.value, self.content), *self.inside))


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
    True
    >>> module.seen
    [1]
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._homes: list[_Home] = []
        self.look()

    def look(self) -> None:
        """Look anew which modules there are."""
        before = {id(home.attributes): home for home in self._homes}
        found = (vars(part) for part in parts(self._module) if not isinstance(part, (Metric, MetricCollection)))
        self._homes = [before.get(id(attributes)) or _Home(attributes) for attributes in found]

    def take(self) -> Snapshot:
        """Return the attributes as they are now, and copies of lists, deques, dicts and sets.

        Of a module where nothing is another thing than at the last time, it is the same object.
        """
        return [home.take() for home in self._homes]

    def put(self, snapshot: Snapshot) -> bool:
        """Put attributes and the content of containers back; what is not in the snapshot goes.

        Returns:
            Whether anything was another thing.
        """
        changed = False
        for known, entries in zip(self._homes, snapshot, strict=True):
            if known.take() is entries:
                continue
            home = known.attributes
            for name in home.keys() - _NOT_THE_USERS - entries.keys():
                del home[name]
                changed = True
            for name, entry in entries.items():
                if name in home and home[name] is entry.value and entry.content is None and not entry.inside:
                    continue
                if not entry.same(_entry(home[name]) if name in home else None):
                    changed = True
                    home[name] = entry.value
                    for container, content in ((entry.value, entry.content), *entry.inside):
                        _fill(container, content)
        return changed


class _Home:
    """The attributes of one module, taken at every outer loss: most are the same things, and hold nothing.

    Args:
        attributes: of the module.
    """

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes
        self._names: list[str] = []
        self._things: list[int] = []  # what the entries keep alive
        self._entries: dict[str, Entry] = {}
        self._moving: list[str] = []

    def take(self) -> dict[str, Entry]:
        """Return the entries; nobody writes to these."""
        now = self.attributes
        names = [name for name in now if name not in _NOT_THE_USERS]
        things = [id(now[name]) for name in names]
        if names != self._names or things != self._things:
            self._names, self._things = names, things
            self._entries = {name: _entry(now[name]) for name in names}
            self._moving = [name for name, entry in self._entries.items() if not entry.fixed]
        elif self._moving:
            written = [name for name in self._moving if not self._entries[name].stands()]
            if written:
                self._entries = {**self._entries, **{name: _entry(now[name]) for name in written}}
        return self._entries


def written_in_place(snapshot: Snapshot) -> list[str]:
    """Return the names of plain tensors that were written to since :meth:`Attributes.take`.

    >>> module = nn.Linear(1, 1)
    >>> module.average = torch.zeros(1)
    >>> start = Attributes(module).take()
    >>> module.average.mul_(0.9).add_(0.1)
    tensor([0.1000])
    >>> written_in_place(start)
    ['average']
    """
    return [
        name
        for entries in snapshot
        for name, entry in entries.items()
        if isinstance(entry.value, Tensor) and entry.version != _version(entry.value)
    ]


def once(start: Snapshot, before: Snapshot, after: Snapshot) -> Snapshot:
    """Return the attributes that count of an estimate: as if the losses had run once since ``start``.

    What the outer loss appended to, or counted, between ``before`` and ``after`` is appended to, or counted from, what
    was there at the start. Of other attributes the last value counts. Tensors in them are taken out of function
    transforms and off their graphs; episodes that were vectorized are then their first dimension.
    """
    counted: Snapshot = []
    for first, earlier, later in zip(start, before, after, strict=True):
        if later is first:
            counted.append(later)
            continue
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
            return later._replace(content=type(later.content)([*first.content, *new[len(old) :]]))
        return later
    counters = [entry.value for entry in (first, earlier, later)]
    if all(isinstance(value, numbers.Number) and not isinstance(value, bool) for value in counters):
        return Entry(counters[0] + (counters[2] - counters[1]), None)
    return later


def _entry(value: Any) -> Entry:
    if type(value) in _ATOMS:
        return Entry(value, None, (), _version(value)) if isinstance(value, Tensor) else Entry(value, None)
    content = _copied(value)
    if content is None and not isinstance(value, tuple):
        return Entry(value, None)
    inside: list[tuple[Any, Any]] = []
    layer, seen = [value if content is None else content], {id(value)}
    for _ in range(_DEPTH):
        following: list[Any] = []
        for each in layer:
            if len(each) > _WIDTH:
                continue
            for part in each.values() if isinstance(each, dict) else each:
                if isinstance(part, tuple):
                    following.append(part)
                elif not isinstance(part, _LEAVES) and id(part) not in seen:
                    seen.add(id(part))
                    copied = _copied(part)
                    if copied is not None:
                        inside.append((part, copied))
                        following.append(copied)
        layer = following
    return Entry(value, content, tuple(inside))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(tensor) else tensor._version


def _copied(value: Any) -> Any:
    """Return a copy of a container, or of the attributes of an object of the user's own making."""
    if isinstance(value, _CONTAINERS):
        return value.copy() if hasattr(value, "copy") else list(value)
    kind: Any = type(value)
    followed = isinstance(value, (UserDict, UserList)) or is_users(kind)
    return dict(vars(value)) if followed and hasattr(value, "__dict__") else None


@lru_cache(maxsize=1_000)
def is_users(kind: Any) -> bool:
    """Return whether a class is a plain one of the user's: a record, a meter."""
    return not issubclass(kind, (*_LEAVES, type, nn.Module)) and all(
        _is_own(each.__module__) for each in kind.__mro__[:-1]
    )


def _is_own(module: str) -> bool:
    return module.partition(".")[0] not in sys.stdlib_module_names and not is_others(module)


def _same_parts(a: Any, b: Any) -> bool:
    mine, others = _parts(a), _parts(b)
    return len(mine) == len(others) and all(x is y for x, y in zip(mine, others, strict=True))


def _parts(content: Any) -> list[Any]:
    if isinstance(content, dict):
        return [part for pair in content.items() for part in pair]
    return [] if content is None else list(content)


def _holds(container: Any, content: Any) -> bool:
    """Return whether a container has the very things in it that a copy has."""
    if content is None:
        return True
    now = container if isinstance(container, _CONTAINERS) else vars(container)
    if len(now) != len(content):
        return False
    if isinstance(now, dict):
        return all(map(is_, now, content)) and all(map(is_, now.values(), content.values()))
    return {*map(id, now)} == {*map(id, content)} if isinstance(now, set) else all(map(is_, now, content))


def _fill(container: Any, content: Any) -> None:
    if content is None:
        return
    if not isinstance(container, _CONTAINERS):
        container = vars(container)
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(content)
    else:
        container.update(content)


def _alive(entry: Entry) -> Entry:
    """Return an entry whose tensors are plain and carry no graph."""
    value = _plain_in(entry.value) if entry.content is None else entry.value
    inside = tuple((container, _alive_content(content)) for container, content in entry.inside)
    return Entry(value, _alive_content(entry.content), inside)


def _alive_content(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _plain_in(value) for key, value in content.items()}
    if isinstance(content, deque):
        return deque(map(_plain_in, content), content.maxlen)
    return list(map(_plain_in, content)) if isinstance(content, list) else content


def _plain_in(value: Any) -> Any:
    """Take a tensor, or those in a tuple, out; containers stay themselves."""
    if not isinstance(value, tuple):
        return plain(value)
    parts = [_plain_in(part) for part in value]
    if all(a is b for a, b in zip(parts, value, strict=True)):
        return value
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def plain(value: Any) -> Any:
    """Take a tensor out of function transforms and off its graph; vectorized episodes become its first dimension."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return value
    value, _ = unwrapped(usable(value))
    return value.detach() if value.requires_grad else value
