"""Whether two problems have the same functions, though these are other objects: closures are made at each estimate.

A stack of episodes is a new problem every time, with losses that call those of the module. What counts is the code of
such functions and what they close over, but for the numbers in tensors: those are arguments of a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

from torch import Tensor

from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.problem import Batch, BilevelProblem, Episode
from lightning_bilevel.stacking import flattened

_WATCHED = {"_inner_loss", "_outer_loss", "_update", "_penalty"}
"""The functions of a module that are watched."""


class Fingerprint(NamedTuple):
    """What functions of a problem are made of.

    Attributes:
        key: equal for problems whose functions are the same.
        functional: the module that they come from.
        calls: names of the functions of the module that they call.
        held: the tensors that they hold, as a strategy's own loss does.
        judged: the outer batches that they hold.
    """

    key: Hashable
    functional: FunctionalModule
    calls: frozenset[str]
    held: list[Tensor]
    judged: list[Batch]


def fingerprint(problem: BilevelProblem, *names: str) -> Fingerprint:
    """Return the fingerprint of some functions of a problem.

    Args:
        problem: the problem.
        names: of the functions; by default those of its step.

    Raises:
        NotCompiled: they hold what may be another thing next time, an object say.
    """
    reader = _Reader()
    key = *(reader.of(getattr(problem, name)) for name in names or ("inner_loss", "update")), problem.stacked
    if not names:
        key = *key, problem.elementwise
    found = reader.found
    if not found or any(each is not found[0] for each in found):
        raise NotCompiled("the losses are not those of one module")
    return Fingerprint(key, found[0], frozenset(reader.calls), list(reader.held.values()), reader.judged)


class _Reader:
    """Reads functions; what it finds on the way is in its attributes."""

    def __init__(self) -> None:
        self.found: list[FunctionalModule] = []
        self.calls: set[str] = set()
        self.held: dict[int, Tensor] = {}
        self.judged: list[Batch] = []

    def of(self, value: Any, names: frozenset[str] = frozenset()) -> Hashable:
        """Return the key of a value; ``names`` is what the function that holds it looks up."""
        if value is None or isinstance(value, (str, int, float, bool)):
            return type(value), repr(value)  # which tells 0.0 from -0.0
        if isinstance(value, MethodType):
            return self._of_method(value)
        if isinstance(value, FunctionType):
            names = _names(value.__code__)
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            held = [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            return value.__code__, tuple(self.of(each, names) for each in held)
        if isinstance(value, functools.partial):
            return self.of(value.func), self.of(value.args), self.of(tuple(value.keywords.items()))
        if isinstance(value, BilevelProblem):
            return tuple(self.of(getattr(value, name), names) for name in sorted(names & vars(value).keys()))
        if isinstance(value, Episode):
            return self._of_episode(value, names)
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        if isinstance(value, dict):
            return dict, tuple(value), tuple(self.of(each, names) for each in value.values())
        if isinstance(value, (tuple, frozenset)):
            return type(value), tuple(self.of(each, names) for each in value)
        raise NotCompiled(f"the strategy steps on a loss of its own, which holds an object, {type(value).__name__}")

    def _of_method(self, value: MethodType) -> Hashable:
        if not isinstance(value.__self__, FunctionalModule):
            return self.of(value.__func__), self.of(value.__self__)
        if value.__name__ not in _WATCHED:
            raise NotCompiled("the strategy steps on a loss of its own")
        self.found.append(value.__self__)
        self.calls.add(value.__name__)
        return value.__name__

    def _of_episode(self, value: Episode, names: frozenset[str]) -> Hashable:
        if "inner" in names:
            raise NotCompiled("the strategy steps on a loss of its own, with inner batches of its own")
        tensors, rest = flattened(value.outer)
        if rest is None:
            raise NotCompiled("a batch holds something else than tensors, numbers and texts in containers")
        self.judged.append(value.outer)
        return rest, tuple(map(self._of_tensor, tensors))

    def _of_tensor(self, value: Tensor) -> Hashable:
        if value.requires_grad:
            raise NotCompiled("the strategy steps on a loss of its own, which holds a tensor with a graph")
        self.held[id(value)] = value
        return list(self.held).index(id(value)), value.shape, value.stride(), value.dtype, value.device


@functools.lru_cache(maxsize=1_000)
def _names(code: CodeType) -> frozenset[str]:
    """Return the names that a function, and those in it, look up."""
    inner = [_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return frozenset(code.co_names).union(*inner)
