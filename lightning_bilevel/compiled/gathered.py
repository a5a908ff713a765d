"""Products of one factor that are added up, as one product with a sum: xᵀδ₁ + xᵀδ₂ = xᵀ (δ₁ + δ₂)."""

from __future__ import annotations

from collections import Counter

from torch import fx

from lightning_bilevel.compiled.terms import (
    PRODUCTS,
    Matrix,
    Multiple,
    Product,
    Sum,
    Term,
    added,
    call,
    matrix,
    multiplied,
    term,
    turned,
)

MOST_PARTS = 200
"""Of a sum that is looked at."""


def gather(graph: fx.GraphModule, node: fx.Node, least: int = 0) -> None:
    """Write the products of one factor in a sum as one, where nothing else needs any of them.

    Args:
        graph: is changed.
        node: the sum; others are left as they are.
        least: operations of a product that is looked at: Inductor adds to small ones as it makes them.

    >>> import torch
    >>> from lightning_bilevel.compiled.graphs import trace
    >>> traced = trace(lambda args: [args[0] @ args[1] - 2 * (args[0] @ args[2])], list(torch.ones(3, 4, 4)))
    >>> gather(traced.graph, list(traced.graph.graph.nodes)[-1].args[0][0])
    >>> traced.graph.graph.eliminate_dead_code()
    True
    >>> [str(node.target) for node in traced.graph.graph.nodes if "mm" in str(node.target)]
    ['aten.mm.default']
    """
    if not isinstance(term(Matrix(node)), Sum) or _goes_into_a_sum(node):
        return
    parts = _parts(Matrix(node), _inside(graph, node))
    products = [each for each in parts.values() if isinstance(each, Product) and each.operations >= least]
    counts = Counter((factor, at_left) for one in products for factor, at_left in zip(one, (True, False), strict=True))
    if not products or len(parts) > MOST_PARTS:
        return
    (factor, at_left), count = counts.most_common(1)[0]
    if count == 1:
        return
    with graph.graph.inserting_before(node):
        rest, other = _Split(graph, parts, factor, at_left).of(Matrix(node))
        assert other is not None
        pair = [turned(graph, factor), other]
        product = call(graph, PRODUCTS[len(factor.shape) - 2], pair if at_left else pair[::-1])
        whole = product if rest is None else added(graph, rest, product, 1.0)
    node.replace_all_uses_with(whole)
    graph.graph.erase_node(node)
    gather(graph, whole, least)


def _goes_into_a_sum(node: fx.Node) -> bool:
    """Return whether all that takes a node is a sum or a multiple of matrices, which is looked at itself."""
    if not node.users:
        return True
    for user in node.users:
        if matrix(user).node is not user:  # it turns the node around
            if not _goes_into_a_sum(user):
                return False
        elif not isinstance(made_of := term(Matrix(user)), (Sum, Multiple)) or getattr(made_of, "factor", None) is node:
            return False
    return True


def _inside(graph: fx.GraphModule, root: fx.Node) -> set[fx.Node]:
    """Return what a sum is made of, and that in turn, as far as nothing else takes it."""
    inside, sums, dead = {root}, {root}, set[fx.Node]()
    for node in reversed(graph.graph.nodes):
        users = [user for user in node.users if user not in dead]
        if not users and node.op != "output":
            dead.add(node)  # what was written otherwise before
        elif users and all(user in sums for user in users):
            inside.add(node)
            if matrix(node).node is not node or isinstance(term(Matrix(node)), (Sum, Multiple)):
                sums.add(node)
    return inside


def _parts(of: Matrix, inside: set[fx.Node]) -> dict[Matrix, Term | None]:
    """Return a matrix and all that it is made of, each with what that is."""
    found: dict[Matrix, Term | None] = {}
    waiting = [of]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found[each] = made_of = term(each) if each.node in inside else None
            waiting += [made_of.first, made_of.second] if isinstance(made_of, Sum) else []
            waiting += [made_of.matrix] if isinstance(made_of, Multiple) else []
    return found


class _Split:
    """Matrices as a rest and a factor times another matrix; ``None`` stands for zero.

    Args:
        graph: takes what is inserted.
        parts: what each matrix is made of.
        factor: as said.
        at_left: whether it is the left one.
    """

    def __init__(self, graph: fx.GraphModule, parts: dict[Matrix, Term | None], factor: Matrix, at_left: bool) -> None:
        self._graph, self._parts, self._factor, self._at_left = graph, parts, factor, at_left
        self._done: dict[Matrix, tuple[fx.Node | None, fx.Node | None]] = {}

    def of(self, each: Matrix) -> tuple[fx.Node | None, fx.Node | None]:
        """Return the rest and the other matrix."""
        if each not in self._done:
            self._done[each] = self._split(each)
        return self._done[each]

    def _split(self, each: Matrix) -> tuple[fx.Node | None, fx.Node | None]:
        made_of = self._parts[each]
        if isinstance(made_of, Product):
            here, beside = made_of if self._at_left else made_of[::-1]
            if here == self._factor:
                return None, turned(self._graph, beside)
        if isinstance(made_of, Multiple):
            rest, other = self.of(made_of.matrix)
            return self._times(rest, made_of.factor, made_of.over), self._times(other, made_of.factor, made_of.over)
        if isinstance(made_of, Sum):
            pairs = zip(self.of(made_of.first), self.of(made_of.second), strict=True)
            rest, other = (self._plus(first, second, made_of.factor) for first, second in pairs)
            return rest, other
        return turned(self._graph, each), None

    def _times(self, value: fx.Node | None, factor: float | fx.Node, over: bool = False) -> fx.Node | None:
        return value and multiplied(self._graph, value, factor, over)

    def _plus(self, first: fx.Node | None, second: fx.Node | None, factor: float) -> fx.Node | None:
        if first is None or second is None:
            return self._times(second, factor) if first is None else first
        return added(self._graph, first, second, factor)
