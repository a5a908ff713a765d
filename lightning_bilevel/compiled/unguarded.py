"""What Dynamo's guards leave out of what a function reads: in which order a dict has its keys, and the environment.

Their contents are guarded, but with torch 2.13 neither the order of an ``OrderedDict``, nor that of the keys of a dict
that is iterated over, nor what ``os.getenv`` returns, and ``os.environ.get`` where nothing has stood so far.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from torch._guards import TracingContext

_ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}
_TORCHS = ("__dict__", *(f".{name}" for name in vars(nn.Module())))
"""Ends of names of dicts whose order no loss goes by."""

_WIDTH = 1_000
"""A longer dict is a table to look things up in."""


class Unguarded:
    """The dicts that a function reads, and whether it reads the environment; made while Dynamo traces it.

    Args:
        function: what is traced.
        args: its arguments.
    """

    def __init__(self, function: FunctionType, args: Sequence[Any]) -> None:
        context = TracingContext.get()
        self._function = function
        self._environment = any(_ENVIRONMENT.intersection(code.co_names) for code in context.traced_code or ())
        names = sorted({guard.name for guard in context.guards_context.dynamo_guards})
        self._dicts: list[CodeType] = []
        scope = self._scope(args)
        for name in names:
            value = () if name.endswith(_TORCHS) else _evaluated(name, scope)
            if isinstance(value, dict) and 1 < len(value) <= _WIDTH:
                self._dicts.append(compile(name, "<guard>", "eval"))

    def now(self, args: Sequence[Any]) -> Hashable:
        """Return what they are now; ``None`` where nothing is left out."""
        if not self._dicts and not self._environment:
            return None
        scope = self._scope(args) if self._dicts else {}
        orders = [_evaluated(code, scope) for code in self._dicts]
        return tuple(map(tuple, orders)), tuple(os.environ.items()) if self._environment else ()

    def _scope(self, args: Sequence[Any]) -> dict[str, Any]:
        """Return what the names of guards are looked up in."""
        code, cells = self._function.__code__, self._function.__closure__ or ()
        own = dict(zip(code.co_varnames, args, strict=False))
        closed = {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
        return {"L": {**own, **closed}, "G": self._function.__globals__}


def _evaluated(name: str | CodeType, scope: dict[str, Any]) -> Any:
    """Return what a guard is for; an empty tuple where that is not there any more, or cannot be named."""
    try:
        return eval(name, scope)  # noqa: S307  # an expression of Dynamo's
    except Exception:  # whatever a user's attribute raises
        return ()
