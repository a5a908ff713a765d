"""What a node of a flat graph is in matrices: a product, a sum, a multiple, or a matrix of its own."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lightning_bilevel.compiled.simplified import DIVIDES, MULTIPLIES

_ATEN = torch.ops.aten
PRODUCTS = (_ATEN.mm.default, _ATEN.bmm.default)
_SAME_IF_SO_SHAPED = (
    _ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default, _ATEN.expand.default, _ATEN.clone.default,
)  # fmt: skip


class Matrix(NamedTuple):
    """A node of shape ``(m, n)``, or ``(b, m, n)`` for a matrix of each episode, or its transpose.

    Attributes:
        node: in the graph.
        turned: whether it is the transpose.
    """

    node: fx.Node
    turned: bool = False

    @property
    def t(self) -> Matrix:
        """The transpose."""
        return Matrix(self.node, not self.turned)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        *batch, m, n = self.node.meta["val"].shape
        return (*batch, n, m) if self.turned else (*batch, m, n)

    def from_here(self, other: Matrix) -> Matrix:
        """Return a part of the node as a part of this matrix."""
        return other.t if self.turned else other


class Product(NamedTuple):
    """``left`` @ ``right``."""

    left: Matrix
    right: Matrix

    @property
    def operations(self) -> int:
        """How many multiplications and additions it takes."""
        return 2 * prod(self.left.shape) * self.right.shape[-1]


class Multiple(NamedTuple):
    """``matrix`` times, or over, a number or a tensor that is one number for each matrix."""

    matrix: Matrix
    factor: float | fx.Node
    over: bool = False


class Sum(NamedTuple):
    """``first`` + ``factor`` · ``second``."""

    first: Matrix
    second: Matrix
    factor: float


Term = Product | Multiple | Sum


def matrix(node: fx.Node) -> Matrix:
    """Return what a node is without what only turns it around, or leaves it as it is."""
    turned = False
    while True:
        if _turns(node):
            turned = not turned
        elif not _is_the_same(node):
            return Matrix(node, turned)
        node = node.args[0]  # type: ignore[assignment]


def is_matrix(value: Any) -> bool:
    """Return whether an argument is a matrix of real numbers, of a precision at which the order of sums is free."""
    there = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(there, Tensor) and there.dtype in (torch.float32, torch.float64) and there.ndim in (2, 3)


def term(of: Matrix) -> Term | None:
    """Return what a matrix is made of, ``None`` where it is none of these."""
    node = of.node
    if node.op != "call_function" or not is_matrix(node):
        return None
    if node.target in PRODUCTS:
        left, right = (matrix(arg) for arg in node.args)  # type: ignore[arg-type]
        return Product(right.t, left.t) if of.turned else Product(left, right)
    found = _sum(node) or _multiple(node)
    if isinstance(found, Sum):
        return found._replace(first=of.from_here(found.first), second=of.from_here(found.second))
    return found and found._replace(matrix=of.from_here(found.matrix))


def _sum(node: fx.Node) -> Sum | None:
    if node.target not in (_ATEN.add.Tensor, _ATEN.sub.Tensor) or not all(_fits(arg, node) for arg in node.args):
        return None
    factor = node.kwargs.get("alpha", 1)
    if not isinstance(factor, (int, float)):
        return None
    first, second = (matrix(arg) for arg in node.args)  # type: ignore[arg-type]
    return Sum(first, second, float(-factor if node.target is _ATEN.sub.Tensor else factor))


def _multiple(node: fx.Node) -> Multiple | None:
    if node.target is _ATEN.neg.default:
        return Multiple(matrix(node.args[0]), -1.0)  # type: ignore[arg-type]
    found = _value_and_factor(node)
    return found and Multiple(matrix(found[0]), found[1], node.target in DIVIDES)


def _value_and_factor(node: fx.Node) -> tuple[fx.Node, float | fx.Node] | None:
    """Return what is multiplied or divided by one number for each matrix, and that."""
    if node.target not in (*MULTIPLIES, *DIVIDES) or node.kwargs:
        return None
    for value, factor in (node.args, node.args[::-1])[: 1 if node.target in DIVIDES else 2]:
        if _fits(value, node) and (number := _factor(factor, node)) is not None:
            return value, number  # type: ignore[return-value]
    return None


def _fits(arg: Any, node: fx.Node) -> bool:
    """Return whether an argument is a matrix of the shape and type of the result."""
    value = node.meta["val"]
    return is_matrix(arg) and arg.meta["val"].shape == value.shape and arg.meta["val"].dtype == value.dtype


def _factor(arg: Any, node: fx.Node) -> float | fx.Node | None:
    """Return an argument that multiplies each matrix by one number, ``None`` where it does not."""
    if isinstance(arg, (int, float)):
        return float(arg)
    if not isinstance(arg, fx.Node) or not isinstance(value := arg.meta.get("val"), Tensor):
        return None
    one = value.ndim == 0 or (value.ndim == node.meta["val"].ndim and value.shape[-2:] == (1, 1))
    return arg if one and value.is_floating_point() else None


def _turns(node: fx.Node) -> bool:
    if node.target is _ATEN.t.default:
        return node.meta["val"].ndim == 2
    if node.target not in (_ATEN.transpose.int, _ATEN.permute.default):
        return False
    args: Any = node.args
    dims = node.meta["val"].ndim
    if node.target is _ATEN.transpose.int:
        return dims > 1 and {axis % dims for axis in args[1:]} == {dims - 2, dims - 1}
    return dims > 1 and [axis % dims for axis in args[1]] == [*range(dims - 2), dims - 1, dims - 2]


def _is_the_same(node: fx.Node) -> bool:
    return node.target in _SAME_IF_SO_SHAPED and _fits(node.args[0], node)


Shares = dict[fx.Node, tuple[float, float]]
"""How much of each matrix there is in a sum, and the sizes of all parts of that together."""


def cancels(of: Matrix, known: dict[fx.Node, Shares]) -> bool:
    """Return whether a sum takes away most of a matrix that it has put in, as W' − W does where W' is W and a step.

    What is left of two products with such parts has the rounding of both.

    Args:
        of: the sum.
        known: the shares in nodes of this graph so far, which others are added to.
    """
    waiting = [of.node]
    while waiting:
        node = waiting[-1]
        parts = _parts(node)
        missing = [part for part, _ in parts or () if part not in known]
        if not missing:
            known[node] = {node: (1.0, 1.0)} if parts is None else _together(parts, known)
            waiting.pop()
        waiting += missing
    return any(abs(share) < size / 2 for share, size in known[of.node].values())


def _parts(node: fx.Node) -> list[tuple[fx.Node, float]] | None:
    """Return what is added up in a node; an unknown factor is taken for a small one, and products for nothing."""
    made_of = term(Matrix(node))
    if isinstance(made_of, Sum):
        return [(made_of.first.node, 1.0), (made_of.second.node, made_of.factor)]
    if isinstance(made_of, Multiple):
        factor = 0.0 if isinstance(made_of.factor, fx.Node) else made_of.factor
        return [(made_of.matrix.node, 1 / factor if made_of.over and factor else factor)]
    return None if made_of is None else []


def _together(parts: Sequence[tuple[fx.Node, float]], known: dict[fx.Node, Shares]) -> Shares:
    shares: Shares = {}
    for part, factor in parts:
        for node, (share, size) in known[part].items():
            before, sizes = shares.get(node, (0.0, 0.0))
            shares[node] = before + factor * share, sizes + abs(factor) * size
    return shares


def turned(graph: fx.GraphModule, of: Matrix) -> fx.Node:
    """Return a matrix as a node, inserted where it is a transpose."""
    if not of.turned:
        return of.node
    plain = of.node.meta["val"].ndim == 2
    return call(graph, _ATEN.t.default, [of.node]) if plain else call(graph, _ATEN.transpose.int, [of.node, -2, -1])


def multiplied(graph: fx.GraphModule, value: fx.Node, factor: float | fx.Node, over: bool = False) -> fx.Node:
    """Insert ``value`` times, or over, a factor."""
    return value if factor == 1 else call(graph, (DIVIDES if over else MULTIPLIES)[0], [value, factor])


def added(graph: fx.GraphModule, first: fx.Node, second: fx.Node, factor: float) -> fx.Node:
    """Insert ``first`` + ``factor`` · ``second``."""
    if factor == -1:
        return call(graph, _ATEN.sub.Tensor, [first, second])
    return call(graph, _ATEN.add.Tensor, [first, multiplied(graph, second, factor)])


def call(graph: fx.GraphModule, target: Any, args: Sequence[Any]) -> fx.Node:
    """Insert a call, with what it returns for shapes."""
    node = graph.graph.call_function(target, tuple(args))
    node.meta["val"] = target(*fx.node.map_arg(args, lambda arg: arg.meta["val"]))
    return node
