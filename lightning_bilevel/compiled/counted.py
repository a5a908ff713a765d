"""Before a graph of a loss that calls metrics is used: what they count and what is logged is what eager does."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_bilevel.compiled.agree import TOLERANCE, TRIES, moved
from lightning_bilevel.compiled.left import Spot
from lightning_bilevel.compiled.program import Functions
from lightning_bilevel.compiled.reasons import NotCompiled, reason
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.modules.recorder import primal

Run = Callable[[list[Tensor]], Sequence[Tensor | None]]


def counted_alike(
    eager: Run, graph: Run, functions: Functions, functional: FunctionalModule, args: list[Tensor], dtype: torch.dtype
) -> None:
    """Raise unless metrics that losses call count alike, and what is logged of them is alike, at one of some points.

    Args:
        eager: of the arguments.
        graph: of the arguments.
        functions: say what the losses leave, and which outputs that is.
        functional: the module.
        args: all that they take.
        dtype: the lowest precision that they compute in.

    Raises:
        NotCompiled: they do not.
    """
    spots = {level: spot for level, spot in functions.spots.items() if spot.left.calls}
    if not spots:
        return
    generator = torch.Generator().manual_seed(0)
    for turn in range(TRIES):
        if turn:
            args = moved(args, functions, generator)
        try:
            with functional.snapshot().fork():
                functions.counts = True
                eager(args)
                expected = {level: functions.seen[level] for level in spots}
            with functional.snapshot().fork():
                results = graph(args)
                found = {level: _seen(results, spot, functional) for level, spot in spots.items()}
        except Exception as error:
            raise NotCompiled(reason(error)) from error
        finally:
            functions.counts = False
        if same(found, expected, TOLERANCE[dtype]):
            return
    raise NotCompiled("compiled, its metrics count something else than they do")


def _seen(results: Sequence[Tensor | None], spot: Spot, functional: FunctionalModule) -> Any:
    logged: dict[str, Any] = {}

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        logged[name] = primal(value), args, kwargs

    aside, logs = ([value for i in each if (value := results[i]) is not None] for each in (spot.aside, spot.logs))
    with functional.recorder.apart(log):
        spot.left.tell(aside, logs, log, functional)
        return logged, functional.recorder.counted


def same(a: Any, b: Any, tolerance: float) -> bool:
    """Return whether two things are the same but for rounding; objects are if they are of one type.

    >>> same({"a": [torch.ones(1), 2]}, {"a": [torch.ones(1) + 1e-9, 2]}, 1e-6), same([1], (1,), 1e-6)
    (True, False)
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, tolerance, tolerance, equal_nan=True)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], tolerance) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return a == b if isinstance(a, (numbers.Number, str, type(None))) else True
