"""Random generators besides PyTorch's own: what draws in a loss, found and put back.

A run that is repeated has to draw the same numbers, whoever draws them: NumPy, ``random``, a generator of the user's.
"""

from __future__ import annotations

import ctypes
import functools
import random
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 6
"""Steps from a module to what it holds; a dataset in a list of an augmentation is four."""

WIDTH = 1_000
"""Entries of a container that are looked at: longer ones are data."""

_TELLING = 9
"""Numbers at the end of the state of a ``random.Random`` that tell it from others."""

_BYTES = 2_500
"""Size of the state of NumPy's MT19937: 624 words, and where it stands in them."""

_latest: list[tuple[bytes, Any]] = []
"""The last state of a ``numpy.random.RandomState`` that was asked for."""

_LEAVES = (Tensor, str, bytes, bytearray, int, float, complex, type(None), range, types.ModuleType, type)
_OF_CODE = (types.MethodType, types.BuiltinFunctionType, functools.partial, property, staticmethod, classmethod)
_OTHERS_CODE = ("torch", "numpy", "pytorch_lightning", "lightning", "lightning_fabric", "torchmetrics", "transformers")
"""Packages whose objects and functions hold no generator of a user's; those in containers of theirs are found."""


def process_generators() -> list[Any]:
    """Return the generators behind the functions of ``random``, and of ``numpy.random`` if that is loaded."""
    found: list[Any] = [random.getstate.__self__]  # type: ignore[attr-defined]
    numpy = sys.modules.get("numpy.random")
    return found if numpy is None else [*found, numpy.get_state.__self__]


def generators_of(module: nn.Module) -> list[Any]:
    """Return the generators that a module can reach without calling anything, each once.

    That are those in attributes of it and its submodules, in containers and objects there, and those that its methods,
    and functions they name, have in closures, defaults and globals. Generators of ``torch``, ``random`` and ``numpy``
    are found, but for those of the process, and for ``random.SystemRandom``, which cannot be repeated.
    """
    skipped = {id(generator) for generator in (*process_generators(), torch.default_generator)}
    for kind in ("cuda", "xpu"):
        skipped |= {id(generator) for generator in getattr(getattr(torch, kind, None), "default_generators", ())}
    return [value for value in _reached(module) if _repeatable(value) and id(value) not in skipped]


def names_read(module: nn.Module) -> tuple[list[type], list[tuple[Mapping[str, Any], str]], list[types.CellType]]:
    """Return what :func:`generators_of` goes by besides attributes: where another thing may stand later.

    Returns:
        The user's classes that are met, the globals that their methods and functions name, each with where it is looked
        up, and the cells of their closures.
    """
    classes: dict[type, None] = {}
    names: dict[tuple[int, str], tuple[Mapping[str, Any], str]] = {}
    cells: dict[int, types.CellType] = {}
    for value in _reached(module):
        if isinstance(value, types.FunctionType):
            if not is_others(value.__module__ or ""):
                namespace = value.__globals__
                names |= {(id(namespace), name): (namespace, name) for name in _globals_of(value)}
                cells |= {id(cell): cell for cell in value.__closure__ or ()}
        elif not isinstance(value, _OF_CODE):
            kind: Any = type(value)
            classes |= dict.fromkeys(_users_classes(kind))
    return list(classes), list(names.values()), list(cells.values())


def _reached(module: nn.Module) -> list[Any]:
    """Return what a module leads to, each object once; generators are not looked into."""
    seen: set[int] = set()
    reached: list[Any] = []
    layer: list[Any] = list(module.modules())
    for _ in range(DEPTH):
        following: list[Any] = []
        for value in layer:
            if id(value) in seen or isinstance(value, _LEAVES):
                continue
            seen.add(id(value))
            reached.append(value)
            if not _repeatable(value):
                following += _held(value)
        layer = following
    return reached


def state_of(generator: Any) -> Any:
    """Return the state of a generator, for :func:`set_state` to put back."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return _state_of_legacy(generator) if hasattr(generator, "get_state") else _bits(generator).state


def _state_of_legacy(generator: Any) -> Any:
    """Return the state of a ``numpy.random.RandomState``.

    NumPy copies it word by word, which takes longer than a step of a small net. What is read here first is where it
    keeps them: where that stands as it did the last time, so does the rest, unless the second of a pair of normal
    numbers waited then, which is handed out without a move.
    """
    bits = generator._bit_generator
    if type(bits).__name__ != "MT19937":
        return generator.get_state(legacy=False)
    words = ctypes.string_at(bits.ctypes.state_address, _BYTES)
    for before, state in _latest:
        if words == before and not state[3]:
            return state
    state = generator.get_state(legacy=True)
    _latest[:] = [(words, state)]
    return state


def set_state(generator: Any, state: Any) -> None:
    """Put back what :func:`state_of` returned."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        _bits(generator).state = state


def seed(generator: Any, value: int) -> None:
    """Let a generator start from a seed, of up to 63 bits."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(value)
    elif isinstance(generator, random.Random):
        generator.seed(value)
    elif hasattr(generator, "get_state"):
        fresh = type(generator._bit_generator)(value)
        generator.set_state({**fresh.state, "has_gauss": 0, "gauss": 0.0})
    else:
        bits = _bits(generator)
        bits.state = type(bits)(value).state


def moved(generator: Any, state: Any) -> bool:
    """Return whether a generator stands elsewhere than in a state that :func:`state_of` returned.

    >>> generator = random.Random(0)
    >>> before = state_of(generator)
    >>> moved(generator, before), generator.random() < 1, moved(generator, before)
    (False, True, True)
    """
    now = state_of(generator)
    if isinstance(generator, random.Random):  # of its 624 words either all change, or where it stands in them: the last
        (_, words, gauss), (_, words_now, gauss_now) = state, now
        return bool(words[-_TELLING:] != words_now[-_TELLING:] or gauss != gauss_now)
    return not _same(state, now)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, dict):
        return all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, tuple):
        return all(map(_same, a, b))
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


def _bits(generator: Any) -> Any:
    """Return what holds the state of one of NumPy's new generators."""
    return getattr(generator, "bit_generator", generator)


def _repeatable(value: Any) -> bool:
    if isinstance(value, (torch.Generator, random.Random)):
        return not isinstance(value, random.SystemRandom)
    numpy = sys.modules.get("numpy.random")
    return numpy is not None and isinstance(value, (numpy.Generator, numpy.RandomState, numpy.BitGenerator))


def _held(value: Any) -> Iterable[Any]:
    """Return what an object holds."""
    if isinstance(value, nn.Module):
        names = ("_parameters", "_buffers", "_modules", "_trainer", "_fabric")
        attributes = [attribute for name, attribute in vars(value).items() if name not in names]
        return [*attributes, *_methods(type(value))]
    if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections"):
        return islice(value.values(), WIDTH)
    if isinstance(value, (list, tuple, deque)):  # no sets: their order, and with it every seed, differs by process
        return islice(value, WIDTH)
    if isinstance(value, types.BuiltinFunctionType):
        return [value.__self__]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        return _named(value)
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if is_others(type(value).__module__):
        return list(vars(value).values()) if isinstance(value, torch.utils.data.Dataset) else []
    return [*getattr(value, "__dict__", {}).values(), *_slots(value), *_methods(type(value))]


def _slots(value: Any) -> Iterator[Any]:
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield getattr(value, name)


def _methods(kind: type) -> Iterator[Any]:
    """Yield the functions of a class, and what it holds itself, as far as the code is the user's."""
    for owner in _users_classes(kind):
        for attribute in vars(owner).values():
            if isinstance(attribute, (staticmethod, classmethod)):
                yield attribute.__func__
            elif isinstance(attribute, property):
                yield attribute.fget
            else:
                yield attribute


@functools.lru_cache(maxsize=1_000)
def _users_classes(kind: type) -> tuple[type, ...]:
    """Return a class and its bases, as far as the code is the user's."""
    return tuple(
        owner
        for owner in kind.__mro__
        if not is_others(owner.__module__) and owner.__module__ not in sys.stdlib_module_names
    )


def _named(function: types.FunctionType) -> Iterator[Any]:
    """Yield what a function of the user's has in its closure, defaults, and under the global names in its code."""
    if is_others(function.__module__ or ""):
        return
    yield getattr(function, "__wrapped__", None)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # empty yet
            continue
    yield from (function.__globals__[name] for name in _globals_of(function))


def _globals_of(function: types.FunctionType) -> Iterator[str]:
    """Yield the names in the code of a function, and of those within it, that are global ones."""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        yield from (name for name in code.co_names if name in function.__globals__)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def is_others(module: str) -> bool:
    """Return whether the code of a module, by its name, is that of PyTorch, NumPy, Lightning or this package."""
    return module.split(".")[0] in (*_OTHERS_CODE, __package__.split(".")[0])
