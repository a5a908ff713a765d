"""What does nothing is left out of a graph, which computes the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from lightning_bilevel.compiled.graphs import trace
from lightning_bilevel.compiled.simplified import filled, simplified

Function = Callable[[list[Tensor]], list[Tensor]]


def targets(graph: fx.GraphModule) -> list[str]:
    return [str(node.target).split(".")[1] for node in graph.graph.nodes if node.op == "call_function"]


def penalties(args: list[Tensor]) -> list[Tensor]:
    """Return a gradient and a Hessian product of powers and sums, with the zeros and ones that autograd writes."""
    w, v = args[0].detach().requires_grad_(), args[1]
    loss = 0.3 * w.square().sum() + (w**3).mean() + w.exp().sum() / 7
    (grad,) = torch.autograd.grad(loss, w, create_graph=True)
    return [grad.detach(), *torch.autograd.grad(grad, w, v)]


FUNCTIONS: dict[str, tuple[Function, list[str]]] = {
    "numbers": (lambda args: [2 * (args[0] * 3), args[1] / 4 * 2], ["mul", "div", "mul"]),
    "ones": (lambda args: [args[0] * torch.ones_like(args[1]), (args[0] ** 1.0).t().t()], []),
    "zeros": (lambda args: [args[0] + torch.zeros_like(args[1]), args[1] - args[0].new_zeros(3, 3)], []),
    "a power of zero": (lambda args: [args[0] ** 0 * args[1]], []),
    "over what is filled": (lambda args: [args[0] / torch.full_like(args[0], 4.0)], ["div"]),
    "a multiple that is needed": (lambda args: [2 * (d := args[0] * 3), d], ["mul", "mul"]),
    "another type": (lambda args: [args[0] * torch.ones(3, 3, dtype=torch.float64)], ["ones", "mul"]),
    "another shape": (lambda args: [args[0][0] * torch.ones_like(args[1])], ["select", "full", "mul"]),
    "whole numbers": (lambda args: [(n := args[0].long()) * torch.ones_like(n)], ["_to_copy", "ones_like", "mul"]),
    "a repeated number": (lambda args: [args[0].sum().expand(3, 3) * args[1]], ["sum", "mul"]),
    "a repeated number over": (lambda args: [args[1] / args[0].sum().expand(3, 3)], ["sum", "div"]),
    "repeated numbers": (lambda args: [args[0].sum().expand(3, 3) * 2], ["sum", "expand", "mul"]),
    "a repeated row": (lambda args: [args[0].sum(0).expand(3, 3) * args[1]], ["sum", "expand", "mul"]),
    "a part of ones": (lambda args: [torch.ones_like(args[0])[1, :2] * args[1][0, 1:]], ["select", "slice"]),
    "a number over": (lambda args: [2 / args[0]], ["reciprocal", "mul"]),
    "over zero": (lambda args: [args[0] / torch.zeros_like(args[0])], ["div"]),
    "an output": (lambda args: [torch.ones_like(args[0].exp())], ["full"]),
}  # fmt: skip


@pytest.mark.parametrize(("function", "left"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_is_left(function: Function, left: list[str]) -> None:
    args = [torch.randn(3, 3), torch.randn(3, 3)]
    graph = simplified(trace(function, args).graph)
    assert targets(graph) == left
    for found, expected in zip(graph(*args), function(args), strict=True):
        torch.testing.assert_close(found, expected)


def test_derivatives_need_no_losses() -> None:
    args = [torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    graph = trace(penalties, args).graph
    before = len(targets(graph))
    changed = simplified(graph)
    assert not {"sum", "mean", "ones_like", "expand"} & set(targets(changed))
    assert len(targets(changed)) < before / 2
    for found, expected in zip(changed(*args), penalties(args), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_is_filled() -> None:
    def values(args: list[Tensor]) -> list[Tensor]:
        one = torch.ones_like(args[0])
        return [one.expand(2, 3).t() * 0.5, torch.full((2,), 3.0) / one[0], torch.ones(2).long(), args[0] + one]

    graph = trace(values, [torch.randn(3)]).graph
    outputs = list(graph.graph.nodes)[-1].args[0]
    assert [filled(node) for node in outputs] == [0.5, 3.0, None, None]
    assert (filled(2), filled(True), filled("mean")) == (2.0, None, None)
