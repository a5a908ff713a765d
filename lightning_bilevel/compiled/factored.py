"""Products of matrices that several steps have in common, written so that they are computed once.

A step of gradient descent adds a product to a layer's weight, W' = c W − xᵀδ, and the next step multiplies that by its
inputs. Where these are the same x, as where each step takes the whole inner set, x W' = c (x W) − (x xᵀ) δ needs
neither W' nor a product with it: x W is known, and x xᵀ is small where there are fewer examples than features. The way
back is the same with cotangents. So a product with a sum is written as a sum of products where these take fewer
operations than it does. The numbers are the same but for the order in which is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import fx

from lightning_bilevel.compiled.gathered import gather
from lightning_bilevel.compiled.norms import Norms
from lightning_bilevel.compiled.terms import (
    PRODUCTS,
    Matrix,
    Multiple,
    Product,
    Shares,
    Sum,
    Term,
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
_WITH_BIAS = {_ATEN.addmm.default: _ATEN.mm.default, _ATEN.baddbmm.default: _ATEN.bmm.default}

LEAST_OPERATIONS = 1_000_000
"""Of a product that is worth a thought: 10 µs on one core."""

WORTH = 0.8
"""What the operations of other products may be of those of the product that they stand for."""

MOST_PAIRS = 100
"""Pairs of matrices that are thought of at one product."""


def factored(graph: fx.GraphModule) -> fx.GraphModule:
    """Compute products of sums, norms of sums and sums of products by fewer operations, where there is a way.

    >>> from lightning_bilevel.compiled.graphs import trace
    >>> x, w, d = torch.randn(50, 400), torch.randn(400, 300), torch.randn(50, 300)
    >>> graph = trace(lambda args: [args[0] @ w, args[0] @ (w - args[0].t() @ args[1])], [x, d]).graph
    >>> before, after = operations(graph), operations(factored(graph))
    >>> round(after / before, 2)  # (x xᵀ) δ are two smaller products
    0.43
    """
    products = Products(graph)
    norms = Norms(graph, products)
    for node in list(graph.graph.nodes):
        products.visit(node)
        norms.visit(node)
    graph.graph.eliminate_dead_code()
    for node in list(graph.graph.nodes):
        gather(graph, node, LEAST_OPERATIONS)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def operations(graph: fx.GraphModule) -> int:
    """Return how many operations the matrix products of a graph take."""
    return sum(found.operations for node in graph.graph.nodes if (found := _product(node)) is not None)


def _product(node: fx.Node) -> Product | None:
    """Return the product that a node is, or has beside a bias."""
    if node.target not in (*PRODUCTS, *_WITH_BIAS) or node.kwargs or not is_matrix(node):
        return None
    left, right = (matrix(arg) for arg in node.args[-2:])  # type: ignore[arg-type]
    return Product(left, right)


class Way(NamedTuple):
    """How a product may be computed.

    Attributes:
        pairs: the products that it is made of.
        term: what one of its factors is.
        at_left: whether that is the left one.
    """

    pairs: list[tuple[Matrix, Matrix]]
    term: Term
    at_left: bool


def _ways(left: Matrix, right: Matrix, shares: dict[fx.Node, Shares]) -> Iterator[Way]:
    """Yield the ways from what the factors are made of; in that of a product, the first of two is in the pairs."""
    for of, at_left in ((right, False), (left, True)):
        made_of = term(of)
        if made_of is None or isinstance(made_of, Sum) and cancels(of, shares):
            continue
        if isinstance(made_of, Product):
            parts = [made_of.right if at_left else made_of.left]
        else:
            parts = [made_of.matrix] if isinstance(made_of, Multiple) else [made_of.first, made_of.second]
        yield Way([(part, right) if at_left else (left, part) for part in parts], made_of, at_left)


class Products:
    """The products of a graph, each computed in the way that takes the fewest operations.

    Args:
        graph: is changed.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._known: dict[tuple[Matrix, Matrix], fx.Node] = {}
        self._best: dict[tuple[Matrix, Matrix], tuple[float, Way | None]] = {}
        self._shares: dict[fx.Node, Shares] = {}

    def visit(self, node: fx.Node) -> None:
        """Rewrite a node if it is a product and another way to it takes fewer operations."""
        if (pair := _product(node)) is None:
            return
        self._best = {}
        if pair.operations < LEAST_OPERATIONS or not self._pays(*pair):
            if self._find(*pair) is None:
                self._known[pair] = node
            return
        with self._graph.graph.inserting_before(node):
            product = self.made(*pair)
        if node.target in _WITH_BIAS:
            node.target, node.args = _ATEN.add.Tensor, (product, node.args[0])
        else:
            node.replace_all_uses_with(product)
            self._graph.graph.erase_node(node)

    def cost(self, left: Matrix, right: Matrix) -> float:
        """Return the fewest operations that a product takes now."""
        self._best = {}
        return self._least(left, right)[0]

    def made(self, left: Matrix, right: Matrix) -> fx.Node:
        """Return a product, which is inserted where it is not known."""
        if (found := self._find(left, right)) is not None:
            return turned(self._graph, self._alone(found))
        _, way = self._least(left, right)
        node = self._plain(left, right) if way is None else self._by(way, left, right)
        self._known[left, right] = node
        return node

    def _pays(self, left: Matrix, right: Matrix) -> bool:
        """Return whether another way takes fewer operations, or as many and one pass less over a larger matrix."""
        least, way = self._least(left, right)
        if way is not None and isinstance(way.term, Multiple):
            if prod((left if way.at_left else right).shape) > prod(left.shape[:-1]) * right.shape[-1]:
                return True
        return least <= WORTH * Product(left, right).operations

    def _least(self, left: Matrix, right: Matrix) -> tuple[float, Way | None]:
        """Return the fewest operations, and the way there: ``None`` for the product itself."""
        if self._find(left, right) is not None:
            return 0.0, None
        if (left, right) not in self._best:
            least: tuple[float, Way | None] = float(Product(left, right).operations), None
            if len(self._best) > MOST_PAIRS:
                return least
            self._best[left, right] = least
            for way in _ways(left, right, self._shares):
                cost = self._cost(left, right, way)
                if cost < least[0] or (cost == least[0] and isinstance(way.term, Multiple)):
                    least = cost, way
            self._best[left, right] = least
        return self._best[left, right]

    def _cost(self, left: Matrix, right: Matrix, way: Way) -> float:
        cost = sum(self._least(*pair)[0] for pair in way.pairs)
        if isinstance(way.term, Product):
            last = way.term.left if way.at_left else way.term.right
            cost += 2 * prod(last.shape) * (right.shape[-1] if way.at_left else left.shape[-2])
        return cost

    def _by(self, way: Way, left: Matrix, right: Matrix) -> fx.Node:
        parts = [self.made(*pair) for pair in way.pairs]
        if isinstance(way.term, Multiple):
            return multiplied(self._graph, parts[0], way.term.factor, way.term.over)
        if isinstance(way.term, Sum):
            return added(self._graph, parts[0], parts[1], way.term.factor)
        inner = matrix(parts[0])
        return self._plain(way.term.left, inner) if way.at_left else self._plain(inner, way.term.right)

    def _plain(self, left: Matrix, right: Matrix) -> fx.Node:
        target = PRODUCTS[len(left.shape) - 2]
        return call(self._graph, target, [turned(self._graph, each) for each in (left, right)])

    def _find(self, left: Matrix, right: Matrix) -> Matrix | None:
        """Return a product that is known; it may be in one with a bias."""
        if (node := self._known.get((left, right))) is not None:
            return Matrix(node)
        node = self._known.get((right.t, left.t))
        return None if node is None else Matrix(node, True)

    def _alone(self, found: Matrix) -> Matrix:
        """Return a known product without the bias that is added to it."""
        node = found.node
        if node.target not in _WITH_BIAS:
            return found
        bias, *factors = node.args
        with self._graph.graph.inserting_before(node):
            product = call(self._graph, _WITH_BIAS[node.target], factors)
        node.target, node.args = _ATEN.add.Tensor, (product, bias)
        left, right = (matrix(each) for each in factors)  # type: ignore[arg-type]
        self._known[left, right] = product
        return Matrix(product, found.turned)
