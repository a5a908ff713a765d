"""What nodes are in matrices, and the nodes that are made of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from lightning_bilevel.compiled.graphs import trace
from lightning_bilevel.compiled.terms import (
    Matrix,
    Multiple,
    Product,
    Sum,
    added,
    cancels,
    is_matrix,
    matrix,
    multiplied,
    term,
    turned,
)

A, B, C = torch.randn(3, 2, 4), torch.randn(3, 4, 2), torch.randn(3, 2, 4)


def last(function: Callable[..., Tensor], *args: Tensor) -> tuple[fx.GraphModule, fx.Node]:
    """Return a graph and the node that it returns."""
    graph = trace(lambda args: [function(*args)], args).graph
    return graph, list(graph.graph.nodes)[-1].args[0][0]


TERMS: dict[str, tuple[Callable[..., Tensor], type | None]] = {
    "product": (lambda a, b, c: a @ b, Product),
    "turned product": (lambda a, b, c: (a @ b).mT, Product),
    "sum": (lambda a, b, c: a + c, Sum),
    "weighed sum": (lambda a, b, c: torch.add(a, c, alpha=0.5), Sum),
    "difference of turned": (lambda a, b, c: torch.sub(a, b.transpose(-2, -1), alpha=2).transpose(-1, -2), Sum),
    "multiple": (lambda a, b, c: 3 * a, Multiple),
    "negative": (lambda a, b, c: -a.mT, Multiple),
    "over a number": (lambda a, b, c: a / 3, Multiple),
    "over a number of the graph": (lambda a, b, c: a / c.sum(), Multiple),
    "pointwise": (lambda a, b, c: a * c, None),
    "by rows": (lambda a, b, c: a * c[..., :1], None),
    "with a number": (lambda a, b, c: a + 1, None),
    "with a bias": (lambda a, b, c: a + c[..., 0, :][..., None, :], None),
    "a number over it": (lambda a, b, c: c.sum() / a, None),
    "rounded": (lambda a, b, c: torch.div(a, 3, rounding_mode="floor"), None),
    "of another type": (lambda a, b, c: a * torch.ones((), dtype=torch.complex64), None),
}


def value_of(made_of: Product | Multiple | Sum, graph: fx.GraphModule) -> fx.Node:
    """Insert what a term says."""
    if isinstance(made_of, Product):
        left, right = (turned(graph, each) for each in made_of)
        return graph.graph.call_function(torch.matmul, (left, right))
    if isinstance(made_of, Sum):
        first, second = turned(graph, made_of.first), turned(graph, made_of.second)
        return added(graph, first, second, made_of.factor)
    return multiplied(graph, turned(graph, made_of.matrix), made_of.factor, made_of.over)


@pytest.mark.parametrize("stacked", [False, True], ids=["one", "stacked"])
@pytest.mark.parametrize(("function", "kind"), TERMS.values(), ids=TERMS)
def test_a_term_is_the_node(function: Callable[..., Tensor], kind: type | None, stacked: bool) -> None:
    args = [each if stacked else each[0] for each in (A, B, C)]
    graph, node = last(function, *args)
    made_of = term(matrix(node))
    assert (None if made_of is None else type(made_of)) is kind
    if made_of is not None:
        output = list(graph.graph.nodes)[-1]
        with graph.graph.inserting_before(output):
            output.args = ([value_of(made_of, graph), turned(graph, Matrix(matrix(node).node))],)
        graph.recompile()
        expected = function(*args)
        found, base = graph(*args)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(base, expected.mT if matrix(node).turned else expected)


def test_a_number_for_each_matrix_is_a_factor() -> None:
    _, node = last(lambda a, c: a * c[:, :1, :1], A, C)
    assert isinstance(term(Matrix(node)), Multiple)
    _, node = last(lambda a, c: a * c[:1, :1, :1], A, C)
    assert isinstance(term(Matrix(node)), Multiple)


@pytest.mark.parametrize(
    "same",
    [lambda a: a.mT.mT, lambda a: a.permute(0, 2, 1).transpose(2, 1), lambda a: a.view(3, 2, 4), lambda a: a.clone()],
)
def test_a_matrix_is_what_it_was_made_from(same: Callable[[Tensor], Tensor]) -> None:
    graph, node = last(same, A)
    assert matrix(node) == Matrix(next(iter(graph.graph.nodes)))


@pytest.mark.parametrize(
    "other", [lambda a: a.permute(1, 0, 2), lambda a: a.view(6, 4), lambda a: a.mT.reshape(3, 2, 4)]
)
def test_a_matrix_that_is_another_one(other: Callable[[Tensor], Tensor]) -> None:
    _, node = last(other, A)
    assert matrix(node).node is not None
    assert matrix(node).shape == other(A).shape


def test_what_is_a_matrix() -> None:
    for value, there in ((A, True), (A[0], True), (A[0, 0], False), (A[None], False), (A.half(), False)):
        _, node = last(lambda a: a * 2, value)
        assert is_matrix(node) is there
    assert not is_matrix(2.0)


def test_what_cancels() -> None:
    def differences(args: list[Tensor]) -> list[Tensor]:
        w, x, d = args
        step = w - 0.1 * (x.t() @ d + 0.01 * w)
        return [step, step - w, 3 * step - 2 * w, w - step / 8, (step + w) / 2, x.t() @ d - w]

    args = [torch.randn(6, 5), torch.randn(4, 6), torch.randn(4, 5)]
    outputs = list(trace(differences, args).graph.graph.nodes)[-1].args[0]
    assert [cancels(Matrix(node), {}) for node in outputs] == [False, True, True, False, False, False]
