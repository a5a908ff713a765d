"""The terms of a Neumann series in one graph: products with one matrix, written out one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from lightning_bilevel.compiled.graphs import Backend, Call, compiled, trace

MOST_NODES = 1_000
"""Operations that are written out; what is larger gains little by it and takes long to compile."""

APART = 1e-3
"""Relative difference from product by product that rounding may make over all terms."""


def written_out(
    product: fx.GraphModule, args: Sequence[Tensor], first: int, count: int, terms: int, step_size: float, way: Backend
) -> Call | None:
    """Return a graph of the arguments of a product to Σ_{k<K} (I − αA)ᵏ v, its last term and the one before.

    Args:
        product: the graph of v ↦ A v, among other arguments.
        args: all that it takes, for their shapes.
        first: of the arguments, which are v.
        count: how many are v.
        terms: K.
        step_size: α.
        way: what compiles.

    Returns:
        ``None`` where it is too large, or where it does not agree with the products.
    """
    if len(product.graph.nodes) * terms > MOST_NODES:
        return None

    def series(inputs: list[Tensor]) -> list[Tensor]:
        before = term = total = list(inputs[first : first + count])
        for _ in range(terms - 1):
            image = product(*inputs[:first], *term, *inputs[first + count :])
            before, term = term, [a - step_size * b for a, b in zip(term, image, strict=True)]
            total = [a + b for a, b in zip(total, term, strict=True)]
        return [*total, *term, *before]

    with torch.no_grad():
        try:
            call = compiled(trace(lambda inputs: [*series(inputs)], args).graph, args, way)
        except Exception:  # torch's, of many kinds; product by product is right, too
            return None
        pairs = zip(call(list(args)), series(list(args)), strict=True)
        return call if all(bool((a - b).norm() <= APART * b.norm()) for a, b in pairs) else None
