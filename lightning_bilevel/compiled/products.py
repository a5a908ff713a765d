"""Products with second derivatives by graphs: one at a time, and the terms of a Neumann series together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.base import Condition
from lightning_bilevel.compiled.evaluation import Evaluation
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.tree import Params


def stationarity(
    part: Evaluation, functional: FunctionalModule, args: list[Tensor], theta: Params, phi: Params
) -> Condition:
    """Return the condition that ∇g is zero.

    Args:
        part: the graphs.
        functional: the module.
        args: all that they take.
        theta: names θ.
        phi: names φ.
    """
    results = part(args)
    part.tell(results, functional)
    residual, kept = results[: part.outputs - part.told.total], results[part.outputs :]

    def product(which: int, like: Params, vector: Params) -> Params:
        vectors = [vector[name].detach().contiguous() for name in theta]
        return dict(zip(like, part.product(which, args, kept, vectors), strict=True))

    def series(vector: Params, terms: int, step_size: float) -> tuple[Params, Params, Params] | None:
        vectors, n = [vector[name].detach().contiguous() for name in theta], len(theta)
        found = part.terms(terms, step_size, args, kept, vectors)
        if found is None:
            return None
        total, last, before = (dict(zip(theta, found[i : i + n], strict=True)) for i in (0, n, 2 * n))
        return total, last, before

    return Condition(
        dict(zip(theta, residual, strict=True)), lambda v: product(0, theta, v), lambda v: product(1, phi, v), series
    )


def at_fixed_point(
    residual: Params, phi: Params, live: Sequence[bool], backward: Callable[[list[Tensor]], list[Tensor]]
) -> Condition:
    """Return the condition that r = s − Ω(s, φ) is zero.

    Args:
        residual: r.
        phi: outer parameters.
        live: which of these Ω depends on.
        backward: cotangents of Ω to those of s and of the outer parameters that it depends on.
    """

    def pulled(vector: Params) -> tuple[Params, Params]:
        with torch.no_grad():
            found = iter(backward([vector[name].detach().contiguous() for name in residual]))
            by_state = {name: next(found) for name in residual}
            by_phi = {
                name: next(found) if there else torch.zeros_like(value)
                for (name, value), there in zip(phi.items(), live, strict=True)
            }
        return by_state, by_phi

    return Condition(
        residual,
        lambda v: tree.sub(v, pulled(v)[0]),
        lambda v: tree.scale(pulled(v)[1], -1.0),
    )
