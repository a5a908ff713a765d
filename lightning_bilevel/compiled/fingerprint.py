"""Whether two problems have the same functions, though these are other objects: closures are made at each estimate.

A stack of episodes is a new problem every time, with losses that call those of the module. What counts is the code of
such functions and what they close over.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.problem import BilevelProblem

_WATCHED = {"_inner_loss", "_update"}
"""The functions of a module that are watched."""


class Fingerprint(NamedTuple):
    """What a step is made of.

    Attributes:
        key: equal for problems whose inner loss and update are the same.
        functional: the module that they come from.
    """

    key: Hashable
    functional: FunctionalModule


def fingerprint(problem: BilevelProblem) -> Fingerprint:
    """Return the fingerprint of a problem's step.

    Raises:
        NotCompiled: its functions hold what may be another thing next time: a tensor, an object.
    """
    found: list[MethodType] = []
    key = _of(problem.inner_loss, found), _of(problem.update, found), problem.elementwise, problem.stacked
    return _checked(key, found, _WATCHED, "the strategy steps on a loss of its own")


def outer_fingerprint(problem: BilevelProblem) -> Fingerprint:
    """Return the fingerprint of a problem's outer loss, like :func:`fingerprint`."""
    found: list[MethodType] = []
    return _checked(_of(problem.outer_loss, found), found, {"_outer_loss"}, "the strategy has one of its own")


def _checked(key: Hashable, found: list[MethodType], watched: set[str], otherwise: str) -> Fingerprint:
    if any(method.__name__ not in watched for method in found):
        raise NotCompiled(otherwise)
    if not found or any(method.__self__ is not found[0].__self__ for method in found):
        raise NotCompiled("the losses are not those of one module")
    functional: Any = found[0].__self__
    return Fingerprint(key, functional)


def _of(value: Any, found: list[MethodType], names: frozenset[str] = frozenset()) -> Hashable:
    if isinstance(value, MethodType):
        if isinstance(value.__self__, FunctionalModule):
            found.append(value)
            return value.__name__
        return _of(value.__func__, found), _of(value.__self__, found)
    if isinstance(value, FunctionType):
        names = _names(value.__code__)
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        held = [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return value.__code__, tuple(_of(each, found, names) for each in held)
    if isinstance(value, functools.partial):
        return _of(value.func, found), _of(value.args, found), _of(tuple(value.keywords.items()), found)
    if isinstance(value, BilevelProblem):
        return tuple(_of(getattr(value, name), found) for name in sorted(names & vars(value).keys()))
    if isinstance(value, (tuple, frozenset)):
        return type(value), tuple(_of(each, found) for each in value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return type(value), value
    raise NotCompiled("the strategy steps on a loss of its own, which holds tensors")


@functools.lru_cache(maxsize=1_000)
def _names(code: CodeType) -> frozenset[str]:
    """Return the names that a function, and those in it, look up."""
    inner = [_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return frozenset(code.co_names).union(*inner)
