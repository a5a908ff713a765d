"""Products of one factor that are added up are one product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from lightning_bilevel.compiled.gathered import gather
from lightning_bilevel.compiled.graphs import trace

Function = Callable[..., list[Tensor]]

SUMS: dict[str, tuple[Function, int]] = {
    "left": (lambda w, x, a, b, s: [w - 0.1 * (x @ a) + x @ b], 1),
    "right": (lambda w, x, a, b, s: [w + a @ x - 2 * (b @ x)], 1),
    "turned": (lambda w, x, a, b, s: [(w + (x.mT @ a).mT) + b.mT @ x], 1),
    "without a rest": (lambda w, x, a, b, s: [-(x @ a) / s - x @ b], 1),
    "a run": (lambda w, x, a, b, s: [s * (s * (w - x @ a) - x @ b) - x @ w], 1),
    "both sides": (lambda w, x, a, b, s: [x @ a + x @ b + a @ w + b @ w], 2),
    "of others": (lambda w, x, a, b, s: [w + x @ a + b @ w], 2),
    "one": (lambda w, x, a, b, s: [w + x @ a], 1),
    "needed besides": (lambda w, x, a, b, s: [w + (p := x @ a) + x @ b, p.tanh()], 2),
    "needed on the way": (lambda w, x, a, b, s: [(v := w + x @ a).exp(), v + x @ b], 2),
    "in a factor": (lambda w, x, a, b, s: [x @ (w + x @ a) + x @ b], 2),
    "the same twice": (lambda w, x, a, b, s: [(p := x @ a) + p], 1),
}


def products(graph: fx.GraphModule) -> int:
    return sum(str(node.target) in ("aten.mm.default", "aten.bmm.default") for node in graph.graph.nodes)


@pytest.mark.parametrize("stacked", [False, True], ids=["one", "stacked"])
@pytest.mark.parametrize(("function", "left"), SUMS.values(), ids=SUMS)
def test_sums_of_products(function: Function, left: int, stacked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(*(2,) * stacked, 4, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
    args.append(torch.tensor(0.7, dtype=torch.float64))
    graph = trace(lambda args: function(*args), args).graph
    if stacked:
        assert "bmm" in graph.code
    for node in list(graph.graph.nodes):
        gather(graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    assert products(graph) == left
    for found, expected in zip(graph(*args), function(*args), strict=True):
        torch.testing.assert_close(found, expected)


def test_long_sums_are_left_alone() -> None:
    def long(args: list[Tensor]) -> list[Tensor]:
        w, x, a = args
        for _ in range(300):
            w = 0.5 * w + a
        return [w + x @ a + x @ (2 * a)]

    args = [torch.randn(4, 4) for _ in range(3)]
    graph = trace(long, args).graph
    for node in list(graph.graph.nodes):
        gather(graph, node)
    assert products(graph) == 2
