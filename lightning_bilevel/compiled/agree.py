"""Before a compiled graph is used: it has to compute what eager does, up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_bilevel.compiled.program import IN_HALVES, Functions, Part
from lightning_bilevel.compiled.reasons import NotCompiled, reason
from lightning_bilevel.randomness import RngState, generator_state

TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Relative difference of an output that rounding may make, also where sums cancel."""

TRIES = 3


def agree(functions: Functions, name: str, part: Part, args: list[Tensor], steps: int, dtype: torch.dtype) -> None:
    """Raise unless a part of a step computes what eager does; see :func:`alike`.

    Args:
        functions: those of the step.
        name: of the function.
        part: what was made of it.
        args: all that it takes.
        steps: before this one.
        dtype: the lowest precision that it computes in.

    Raises:
        NotCompiled: it does not; the words say which output is apart, and by how much.
    """
    function = getattr(functions, name)
    alike(
        lambda args: function(list(args), steps),
        lambda args: _computed(functions, name, part, args, steps),
        functions,
        args,
        dtype,
    )


Run = Callable[[list[Tensor]], Sequence[Tensor | None]]


def alike(eager: Run, graph: Run, functions: Functions, args: list[Tensor], dtype: torch.dtype) -> None:
    """Raise unless a graph computes what eager does at one of some points, with the same random draws, and no more.

    At one of them, for the ReLU of a unit near 0 may open in one and not in the other: that is rounding too, but a
    derivative jumps there. A wrong graph is wrong everywhere. Cotangents, tangents and directions are random ones.
    Outputs that are 0 but for rounding (the gradient of a
    bias before a batch norm) count by the largest output, but for what is returned beside a loss, of any size.

    Args:
        eager: of the arguments.
        graph: of the arguments.
        functions: say what an output is, and which arguments are state and vectors.
        args: all that they take.
        dtype: the lowest precision that they compute in.

    Raises:
        NotCompiled: it does not.
    """
    generator = torch.Generator().manual_seed(0)
    message, own = "", functions.layout.inputs
    args = [
        *args[:own],
        *(_drawn(arg, generator) for arg in args[own:]),
    ]  # what is zero at the start hides what it meets
    for turn in range(TRIES):
        if turn:
            args = moved(args, functions, generator)
        try:
            expected, end = _drawn_alike(eager, args)
            found, other = _drawn_alike(graph, args)
        except Exception as error:
            raise NotCompiled(reason(error)) from error
        if not torch.equal(end, other):
            raise NotCompiled("compiled, it draws other random numbers than it does")
        message = _apart(functions, expected, found, TOLERANCE[dtype])
        if not message:
            return
    raise NotCompiled(f"compiled, it is not what it is: {message}")


def precision(args: Sequence[Tensor], autocast: torch.dtype | None) -> torch.dtype:
    """Return the lowest precision among arguments and what the losses are cast to."""
    found = [arg.dtype for arg in args if arg.dtype in TOLERANCE]
    return max([*found, *([] if autocast is None else [autocast])], key=TOLERANCE.__getitem__)


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device).to(like.dtype)


def moved(args: list[Tensor], functions: Functions, generator: torch.Generator) -> list[Tensor]:
    """Return the arguments with another state near by."""
    n = len(functions.layout.names)
    return [*(arg * (1 + 1e-3 * _drawn(arg, generator)) for arg in args[:n]), *args[n:]]


def _drawn_alike(run: Run, args: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return what a function returns, and where the generators stand then; they are put back."""
    device = args[0].device
    with RngState(device).fork():
        values = [value for value in run(list(args)) if value is not None]
        there = generator_state(device)
        return values, torch.cat([torch.get_rng_state(), *([] if there is None else [there.cpu()])])


def _computed(functions: Functions, name: str, part: Part, args: list[Tensor], steps: int) -> list[Tensor]:
    """Return all outputs, from both halves where there are two."""
    with torch.no_grad():
        if name not in IN_HALVES:
            return list(part(steps, args))
        layout = functions.layout
        own, cotangents = args[: layout.inputs], args[layout.inputs :]
        results = list(part(steps, own))
        return results[: part.outputs] + part.backward(steps, own, results[part.outputs :], cotangents)


def _apart(functions: Functions, expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> str:
    """Return which outputs are apart, and by how much; empty where none are."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(found, expected, strict=True)]
    counted = [b for number, (_, b) in enumerate(pairs) if not functions.is_aside(number) and b.is_floating_point()]
    size = max((float(b.norm()) for b in counted if b.isfinite().all()), default=0.0)
    for number, (a, b) in enumerate(pairs):
        if not (b.is_floating_point() or b.is_complex()):
            apart = float(not torch.equal(a, b))
        elif not b.isfinite().all():
            apart = float(not torch.equal(a.isfinite(), b.isfinite()))
        else:
            apart = float((a - b).norm() / (b.norm() + 1e-3 * size + torch.finfo(b.dtype).tiny))
        if not apart <= tolerance:
            return f"{functions.described(number)} is apart by {apart:.0e} of its size"
    return ""
