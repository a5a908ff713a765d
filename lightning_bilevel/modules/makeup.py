"""What a module is made of, as far as that is seen without calling anything: whether a look at it still holds."""

from __future__ import annotations

from collections import UserDict, UserList, deque
from types import CellType
from typing import Any

from torch import Tensor, nn

from lightning_bilevel.generators import names_read
from lightning_bilevel.modules.attributes import is_users

_ATOMS = (int, float, complex, bool, str, bytes, type(None))
_CONTAINERS = (list, tuple, set, frozenset, deque)

_DEPTH, _WIDTH = 4, 1_000
"""How far into containers and objects marks go; a longer container is data, and marked by its length."""

_OWN = {"fit_context", "_levels"}
"""What this package keeps in a module."""


class Makeup:
    """Marks of all that a module's code can read: its parts, their attributes, and the names that its methods use.

    Numbers and words are marked by what they are, tensors by dtype, device and whether they need gradients, and all by
    which objects they are; nothing is kept alive. A change of values in a tensor is none.

    Args:
        module: the module.

    >>> module = nn.Linear(1, 1)
    >>> makeup = Makeup(module)
    >>> with __import__("torch").no_grad():
    ...     module.bias += 1
    >>> makeup.holds()
    True
    >>> module.options = {"smooth": True}
    >>> makeup.holds()
    False
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._classes, self._names, self._cells = names_read(module)
        self._marks = self._now()

    def holds(self) -> bool:
        """Return whether all is as it was."""
        return self._marks == self._now()

    def _now(self) -> tuple[Any, ...]:
        parts = [(id(child), type(child), _of_part(child)) for child in self._module.modules()]
        classes = [tuple(map(id, vars(kind).values())) for kind in self._classes]
        read = [*(namespace.get(name) for namespace, name in self._names), *map(_content, self._cells)]
        return parts, classes, [_mark(value, 1, set()) for value in read]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty yet
        return None


def _of_part(child: nn.Module) -> list[Any]:
    seen: set[int] = set()
    return [(name, _mark(value, _DEPTH, seen)) for name, value in vars(child).items() if name not in _OWN]


def _mark(value: Any, depth: int, seen: set[int]) -> Any:
    kind: Any = type(value)
    if kind in _ATOMS:
        return value
    if isinstance(value, Tensor):
        return id(value), value.requires_grad, value.dtype, value.device
    inside: Any = None
    if depth and id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, dict):
            inside = [part for pair in value.items() for part in pair] if len(value) <= _WIDTH else len(value)
        elif isinstance(value, _CONTAINERS):
            inside = list(value) if len(value) <= _WIDTH else len(value)
        elif isinstance(value, (UserDict, UserList)) or is_users(kind):
            inside = [part for pair in getattr(value, "__dict__", {}).items() for part in pair]
    return id(value), [_mark(each, depth - 1, seen) for each in inside] if isinstance(inside, list) else inside
