"""What the solvers share: systems in a form to compute with, where iterations start, a warning given once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import reduce
from weakref import WeakSet

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.errors import nonfinite_error
from lightning_bilevel.linear_solvers.base import Dot, LinearSolver, LinearSystem, MatVec
from lightning_bilevel.tree import Params

FLAT = ""
"""The name of the one vector of a flattened system: no parameter has it."""


def normalized(system: LinearSystem) -> tuple[LinearSystem, MatVec]:
    """Return the :func:`widened` system with b and x0 divided by ‖b‖, and what takes its solution back.

    Residuals are relative then, whatever the units of b. x0 is dropped where b is zero, for so is x.
    """
    system, narrow = widened(system)
    square = system.dot(system.b, system.b)
    length = square.sqrt().clamp_min(torch.finfo(square.dtype).tiny)
    x0 = None if system.x0 is None else tree.scale(system.x0, (square > 0) / length)
    unit = system._replace(b=tree.scale(system.b, 1 / length), x0=x0)
    return unit, lambda x: narrow(tree.scale(x, length))


def widened(system: LinearSystem) -> tuple[LinearSystem, MatVec]:
    """Return the system in the widest dtype of ``b``, at least float32, and what takes its solution back.

    Recurrences in bfloat16 lose what the products still know. The system's functions get tensors of ``b``'s dtypes, in
    the caller's grad mode; the vectors here carry no graph. With ``tree.dot`` they are :func:`flattened`: one operation
    in place of one a name. With another ``dot`` entries may be elsewhere, and vectors keep their names and shapes.
    """
    if system.dot is tree.dot:
        return flattened(system)
    dtype, b = _widest(system.b), system.b
    dtypes = {name: torch.promote_types(value.dtype, dtype) for name, value in b.items()}
    return _rewritten(
        system,
        lambda a: {name: a[name].detach().to(wide) for name, wide in dtypes.items()},
        lambda a: {name: a[name].to(value.dtype) for name, value in b.items()},
        system.dot,
    )


def flattened(system: LinearSystem) -> tuple[LinearSystem, MatVec]:
    """Return :func:`widened`, always on one real vector ``{FLAT: (M,)}``, in which a complex entry has two places."""
    dtype, b = _widest(system.b), system.b
    shapes = _as_real(b, b)
    return _rewritten(
        system,
        lambda a: {FLAT: tree.flatten(_as_real(a, b)).detach().to(dtype)},
        lambda a: _as_complex(tree.unflatten(a[FLAT], shapes), b),
        lambda u, v: u[FLAT].dot(v[FLAT]),
    )


def start(system: LinearSystem) -> tuple[Params, Params, int]:
    """Return x0, its residual b − A x0 and the number of products that took; zero, b and none without an x0."""
    if system.x0 is None:
        return tree.zeros_like(system.b), system.b, 0
    return system.x0, tree.sub(system.b, system.matvec(system.x0)), 1


def same(v: Params) -> Params:
    """The preconditioner of a system that has none."""
    return v


def columns(system: LinearSystem, positions: Sequence[int], owner: str) -> Tensor:
    """Return the columns at ``positions`` of a flattened A, of shape ``(M, len(positions))``; one product each.

    Raises:
        FloatingPointError: a product is nan or infinite, which decompositions report as something else.
    """
    like = system.b[FLAT]
    matrix = like.new_empty(like.numel(), len(positions))
    for column, position in enumerate(positions):
        unit = torch.zeros_like(like)
        unit[position] = 1
        matrix[:, column] = system.matvec({FLAT: unit})[FLAT]
    if not torch.isfinite(matrix).all():
        hint = "Look at the inner loss and at its second derivatives."
        raise nonfinite_error(f"Hessian products of `{owner}`", "nan or inf", hint)
    return matrix


def warn_once(solver: LinearSolver, message: str) -> None:
    """Warn, unless this object did before: a solver is asked at every step of a fit."""
    if solver not in _WARNED:
        _WARNED.add(solver)
        warnings.warn(message, stacklevel=3)


_WARNED: WeakSet[LinearSolver] = WeakSet()
"""Beside the solvers rather than in them: that one has warned is no part of what is copied, compared or saved."""


def _rewritten(system: LinearSystem, widen: MatVec, narrow: MatVec, dot: Dot) -> tuple[LinearSystem, MatVec]:
    def through(fn: MatVec) -> MatVec:
        return lambda v: widen(fn(narrow(v)))

    def at_once(v: Params, terms: int, step_size: float) -> tuple[Params, Params, Params] | None:
        found = None if system.series is None else system.series(narrow(v), terms, step_size)
        return None if found is None else (widen(found[0]), widen(found[1]), widen(found[2]))

    exact = all(value.dtype == _widest(system.b) for value in system.b.values())  # terms keep the precision of here
    rewritten = LinearSystem(
        through(system.matvec),
        widen(system.b),
        None if system.x0 is None else widen(system.x0),
        None if system.precondition is None else through(system.precondition),
        dot,
        system.symmetric,
        at_once if system.series is not None and exact else None,
    )
    return rewritten, narrow


def _widest(a: Params) -> torch.dtype:
    return reduce(torch.promote_types, (value.dtype.to_real() for value in a.values()), torch.float32)


def _as_real(a: Params, like: Params) -> Params:
    """See complex tensors as real ones of shape ``(*shape, 2)``; in the order of ``like``."""
    return {name: torch.view_as_real(a[name].resolve_conj()) if a[name].is_complex() else a[name] for name in like}


def _as_complex(a: Params, like: Params) -> Params:
    """The inverse of :func:`_as_real`."""
    return {name: torch.complex(*a[name].unbind(-1)) if value.is_complex() else a[name] for name, value in like.items()}
