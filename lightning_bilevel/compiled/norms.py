"""Squared norms of sums of products, as in weight decay, by inner products of small matrices.

‖W − xᵀδ‖² = ‖W‖² − 2 ⟨x W, δ⟩ + ⟨(x xᵀ) δ, δ⟩ needs no W − xᵀδ, and where the products are known it costs next to
nothing: what the inner loss of a step was is all that W at that step may be needed for.
"""

from __future__ import annotations

from math import inf
from typing import Any, Protocol

import torch
from torch import fx

from lightning_bilevel.compiled.terms import (
    Matrix,
    Multiple,
    Product,
    Shares,
    Sum,
    added,
    call,
    cancels,
    is_matrix,
    matrix,
    multiplied,
    term,
    turned,
)

_ATEN = torch.ops.aten

WORTH = 0.1
"""What the operations of the inner products may be of those of the product in the sum."""

MOST_PAIRS = 100
"""Pairs of matrices that are thought of at one norm."""


class Source(Protocol):
    """Makes products of matrices; see :class:`~lightning_bilevel.compiled.factored.Products`."""

    def cost(self, left: Matrix, right: Matrix) -> float:
        """Return the fewest operations of a product."""

    def made(self, left: Matrix, right: Matrix) -> fx.Node:
        """Return a product."""


Pair = tuple[Matrix, Matrix]


class Norms:
    """The squared norms of a graph.

    Args:
        graph: is changed.
        products: makes products.
    """

    def __init__(self, graph: fx.GraphModule, products: Source) -> None:
        self._graph, self._products = graph, products
        self._known: dict[tuple[Any, Pair], fx.Node] = {}
        self._costs: dict[Pair, float] = {}
        self._shares: dict[fx.Node, Shares] = {}
        self._places = {node: place for place, node in enumerate(graph.graph.nodes)}

    def visit(self, node: fx.Node) -> None:
        """Rewrite a node if it is a squared norm and other ones make it."""
        if (of := _squared(node)) is None or cancels(of, self._shares):
            return
        self._costs, how = {}, (node.target, *map(str, node.args[1:]))
        if self._cost(how, of, of) <= WORTH * _largest(of):
            with self._graph.graph.inserting_before(node):
                other = self._made(how, node, of, of)
            node.replace_all_uses_with(other)
            self._graph.graph.erase_node(node)
            node = other
        self._known[how, (of, of)] = node

    def _cost(self, how: Any, left: Matrix, right: Matrix) -> float:
        """Return the operations of the products that make an inner product; infinitely many where none do."""
        if self._find(how, left, right) is not None:
            return 0.0
        if (left, right) not in self._costs:
            if len(self._costs) > MOST_PAIRS:
                return inf
            self._costs[left, right] = inf
            self._costs[left, right] = self._cost_of(how, *self._latter_last(left, right))
        return self._costs[left, right]

    def _cost_of(self, how: Any, other: Matrix, of: Matrix) -> float:
        made_of = term(of)
        if isinstance(made_of, Product):
            return self._products.cost(other, made_of.right.t)
        if isinstance(made_of, Sum):
            return self._cost(how, other, made_of.first) + self._cost(how, other, made_of.second)
        return self._cost(how, other, made_of.matrix) if made_of and _is_one_number(made_of) else inf

    def _latter_last(self, left: Matrix, right: Matrix) -> tuple[Matrix, Matrix]:
        """Return two matrices so that the second one may be made of the first one, but not the other way around."""
        places = [self._places.get(each.node, -1) for each in (left, right)]
        return (left, right) if places[0] <= places[1] else (right, left)

    def _made(self, how: Any, like: fx.Node, left: Matrix, right: Matrix) -> fx.Node:
        """Return an inner product, summed up as a norm like this one is."""
        if (found := self._find(how, left, right)) is not None:
            return found
        left, right = self._latter_last(left, right)
        made_of, graph = term(right), self._graph
        if isinstance(made_of, Product):
            product = self._products.made(left, made_of.right.t)
            value = call(graph, _ATEN.mul.Tensor, [product, turned(graph, made_of.left)])
            value = call(graph, like.target, [value, *like.args[1:]])
        elif isinstance(made_of, Sum):
            first, second = (self._made(how, like, left, part) for part in (made_of.first, made_of.second))
            value = added(graph, first, second, made_of.factor)
        else:
            assert isinstance(made_of, Multiple)
            value = multiplied(graph, self._made(how, like, left, made_of.matrix), made_of.factor, made_of.over)
        self._known[how, (left, right)] = value
        return value

    def _find(self, how: Any, left: Matrix, right: Matrix) -> fx.Node | None:
        pairs = (left, right), (right, left), (left.t, right.t), (right.t, left.t)
        return next((self._known[how, pair] for pair in pairs if (how, pair) in self._known), None)


def _squared(node: fx.Node) -> Matrix | None:
    """Return the matrix whose squared norm a node is: of all of it, or of each episode's."""
    args: Any = node.args
    if node.target is _ATEN.sum.dim_IntList:
        value, axes, *rest = args
        if not isinstance(value, fx.Node) or rest not in ([], [False]) or node.kwargs or not is_matrix(value):
            return None
        dims = value.meta["val"].ndim
        if {axis % dims for axis in axes} != {dims - 2, dims - 1}:
            return None
    elif node.target is not _ATEN.sum.default or node.kwargs:
        return None
    square: Any = args[0]
    if square.target is _ATEN.pow.Tensor_Scalar and square.args[1] == 2 and is_matrix(square.args[0]):
        return Matrix(matrix(square.args[0]).node)
    if square.target is _ATEN.mul.Tensor and square.args[0] is square.args[1] and is_matrix(square.args[0]):
        return Matrix(matrix(square.args[0]).node)
    return None


def _is_one_number(multiple: Multiple) -> bool:
    """Return whether a factor is the same for all episodes, so that it is one of their norms too."""
    factor = multiple.factor
    return not isinstance(factor, fx.Node) or factor.meta["val"].ndim == 0


def _largest(of: Matrix, looked: int = 8) -> int:
    """Return the operations of the largest product in a sum, no deeper than this."""
    made_of = term(of)
    if made_of is None or looked == 0:
        return 0
    if isinstance(made_of, Product):
        return made_of.operations
    parts = [made_of.matrix] if isinstance(made_of, Multiple) else [made_of.first, made_of.second]
    return max(_largest(part, looked - 1) for part in parts)
