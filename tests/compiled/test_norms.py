"""Squared norms of sums of products by smaller ones are the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from lightning_bilevel.compiled.factored import Products, operations
from lightning_bilevel.compiled.graphs import trace
from lightning_bilevel.compiled.norms import Norms
from lightning_bilevel.compiled.simplified import simplified

EXAMPLES, FEATURES, HIDDEN = 20, 60, 50
Norm = Callable[[Tensor], Tensor]
NORMS: dict[str, Norm] = {
    "square": lambda w: w.square().sum(),
    "product": lambda w: (w * w).sum(),
    "turned": lambda w: (w.mT**2).sum(),
    "axes": lambda w: w.square().sum((-1, -2)),
}


def arguments(stacked: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(HIDDEN, FEATURES), (EXAMPLES, FEATURES), (EXAMPLES, HIDDEN), (EXAMPLES, HIDDEN)]
    return [torch.randn(2, *s, generator=generator, dtype=torch.float64)[slice(None) if stacked else 0] for s in shapes]


def with_norms(function: Callable[[list[Tensor]], list[Tensor]], args: list[Tensor]) -> fx.GraphModule:
    """Return the graph of a function with other products and norms in it."""
    graph = simplified(trace(function, args).graph)
    products = Products(graph)
    norms = Norms(graph, products)
    for node in list(graph.graph.nodes):
        products.visit(node)
        norms.visit(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def rewritten(function: Callable[[list[Tensor]], list[Tensor]], args: list[Tensor]) -> fx.GraphModule:
    """Return that graph, and check that it computes the same."""
    graph = with_norms(function, args)
    for found, expected in zip(graph(*args), function(args), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    return graph


def large_squares(graph: fx.GraphModule) -> int:
    """Return how many tensors as large as a weight are squared."""
    values = [node.meta["val"] for node in graph.graph.nodes if node.name.startswith(("pow", "mul"))]
    return sum(value.numel() % (HIDDEN * FEATURES) == 0 for value in values)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bilevel.compiled.factored.LEAST_OPERATIONS", 0)


@pytest.mark.parametrize("stacked", [False, True], ids=["one", "stacked"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_the_norm_of_a_step_is_one_of_small_products(norm: Norm, stacked: bool) -> None:
    def steps(args: list[Tensor]) -> list[Tensor]:
        w, x, *deltas = args
        found = [norm(w)]
        for delta in deltas:
            inputs = x @ w.mT
            w = w - (delta + 0.1 * inputs).mT @ x
            found += [(x @ w.mT).mean(), norm(w)]
        return found

    args = arguments(stacked)
    graph = rewritten(steps, args)
    assert operations(graph) < operations(simplified(trace(steps, args).graph)) / 1.5
    assert large_squares(graph) <= 1  # of the start


def test_multiples() -> None:
    def multiples(args: list[Tensor]) -> list[Tensor]:
        w, x, *_ = args
        return [w.square().sum(), (3 * w).square().sum(), (w / x.mean()).square().sum(), (-w).square().sum()]

    assert large_squares(rewritten(multiples, arguments(False))) == 1


def test_multiples_by_a_number_for_each_episode_stay() -> None:
    def multiples(args: list[Tensor]) -> list[Tensor]:
        w, x, *_ = args
        rates = x.mean((1, 2), keepdim=True)
        return [w.square().sum(), (w * rates).square().sum(), (w * rates).square().sum((1, 2))]

    assert large_squares(rewritten(multiples, arguments(True))) >= 3


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cubes": lambda w, p: ((w - p) ** 3).sum(),
    "rows": lambda w, p: (w - p).square().sum(0),
    "kept axes": lambda w, p: (w - p).square().sum((0, 1), keepdim=True),
    "no squares": lambda w, p: (w - p).sum(),
    "of two": lambda w, p: (w * (w - p)).sum(),
    "pointwise": lambda w, p: (w - p).tanh().square().sum(),
    "of vectors": lambda w, p: (w - p)[0].square().sum(),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_is_no_norm_of_a_matrix_stays(other: Callable[[Tensor, Tensor], Tensor]) -> None:
    def function(args: list[Tensor]) -> list[Tensor]:
        w, x, delta, _ = args
        return [w.square().sum(), x @ w.mT, (x @ x.T) @ delta, other(w, delta.mT @ x)]

    rewritten(function, arguments(False))


def test_what_is_left_of_a_difference_is_not_rounded_away() -> None:
    def function(args: list[Tensor]) -> list[Tensor]:
        w, x, delta, _ = args
        step = w - 1e-4 * (delta.mT @ x)
        return [
            w.square().sum(),
            x @ w.mT,
            (x @ x.mT) @ delta,
            x @ step.mT,
            (step - w).square().sum(),
            x @ (step - w).mT,
        ]

    exact = arguments(False)
    args = [value.float() for value in exact]
    graph = with_norms(function, args)
    for found, plain, expected in zip(graph(*args), function(args), function(exact), strict=True):
        error, plainly = (torch.dist(value.double(), expected) for value in (found, plain))
        assert error < 4 * plainly + 1e-6 * expected.norm()


def test_a_norm_that_would_take_more_stays() -> None:
    def function(args: list[Tensor]) -> list[Tensor]:
        w, x, delta, _ = args
        return [w.square().sum(), (w - delta.mT @ x).square().sum()]  # nothing else is made of x

    args = arguments(False)
    expected = operations(simplified(trace(function, args).graph))
    assert operations(rewritten(function, args)) == expected
