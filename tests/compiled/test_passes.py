"""What is done to graphs leaves them what they compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lightning_bilevel.compiled.graphs import trace
from lightning_bilevel.compiled.passes import apart, by_rows, cut, without_alpha


def whole(args: list[Tensor]) -> list[Tensor | None]:
    """Return a value with a random mask in it, and its gradient along a cotangent."""
    w, x, cotangent = args[0].detach().requires_grad_(), args[1], args[2]
    hidden = (x @ w).tanh() * (torch.rand(4) > 0.5)
    (grad,) = torch.autograd.grad(hidden, w, cotangent)
    return [hidden.detach(), grad]


def test_the_halves_are_the_whole() -> None:
    args = [torch.randn(3), torch.randn(4, 3), torch.randn(4)]
    traced = trace(whole, args)
    halves = cut(traced.graph, 2, 1, len(traced.read))
    torch.manual_seed(0)
    expected = traced.graph(*args, *traced.read)
    torch.manual_seed(0)
    value, *kept = halves.forward(*args[:2], *traced.read)
    state = torch.get_rng_state()
    (grad,) = halves.backward(*args[:2], *kept, args[2], *traced.read)
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(grad, expected[1])
    assert torch.equal(state, torch.get_rng_state())  # the mask was kept, not drawn again
    assert 0 < len(kept) <= 3


def test_a_sum_is_kept_rather_than_the_product_in_it() -> None:
    def steps(args: list[Tensor]) -> list[Tensor | None]:
        w, x, cotangent = args[0].detach().requires_grad_(), args[1], args[2]
        v = w
        for _ in range(5):
            v = v - 0.1 * (v.tanh() @ x)
        (grad,) = torch.autograd.grad(v, w, cotangent)
        return [v.detach(), grad]

    args = [torch.randn(3, 3) for _ in range(3)]
    halves = cut(trace(steps, args).graph, 2, 1, 0)
    value, *kept = halves.forward(*args[:2])
    expected = steps(args)
    torch.testing.assert_close([value, *halves.backward(*args[:2], *kept, args[2])], expected)
    assert len(kept) == 4  # what the steps but the last one lead to
    assert "aten.sub.Tensor" not in targets(halves.backward)  # which does not take these steps again


def test_a_factor_in_an_addition_is_written_out() -> None:
    args = [torch.randn(3), torch.randn(3)]
    for function in (torch.add, torch.sub):
        graph = trace(lambda args, function=function: [function(*args, alpha=0.5)], args).graph
        assert any("alpha" in node.kwargs for node in graph.graph.nodes)
        expected = function(*args, alpha=0.5)
        changed = without_alpha(graph)
        assert not any("alpha" in node.kwargs for node in changed.graph.nodes)
        torch.testing.assert_close(changed(*args)[0], expected)


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (0, 2, 1), (0, 1, 2)], ids=str)
def test_masks_of_what_is_permuted_are_those_of_dropout(order: tuple[int, ...]) -> None:
    def masked(args: list[Tensor]) -> list[Tensor | None]:
        return [F.dropout(args[0].permute(order), 0.4), args[0].permute(order)[:, ::2].bernoulli(0.3), torch.rand(2)]

    args = [torch.randn(3, 4, 5)]
    graph = trace(masked, args).graph
    found = []
    for run in (masked, lambda args: graph(*args)):
        torch.manual_seed(0)
        found.append(run(args))
    assert all(map(torch.equal, *found))


def targets(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def test_what_follows_a_stack_of_large_rows_is_computed_by_rows() -> None:
    def stacked(args: list[Tensor]) -> list[Tensor | None]:
        z, w, *rows = args
        stack = torch.stack(rows)
        return [z + torch.tanh(stack) * -0.1, stack.sum(0), torch.stack(rows, dim=1) * 2, stack * w]

    args = [torch.randn(2, 300, 300), torch.randn(300), torch.randn(300, 300), torch.randn(300, 300)]
    graph = trace(stacked, args).graph
    expected = graph(*args)
    changed = by_rows(graph)
    assert targets(changed).count("aten.tanh.default") == 2
    assert targets(changed).count("aten.select.int") == 2  # of `z`
    assert all(map(torch.equal, changed(*args), expected))


def test_other_stacks_stay() -> None:
    def small(args: list[Tensor]) -> list[Tensor | None]:
        return [torch.stack(args) * 2, torch.stack([torch.rand_like(args[0]), args[1]]).square()]

    args = [torch.randn(3), torch.randn(3)]
    before = trace(small, args).graph
    expected = targets(before)
    assert targets(by_rows(before)) == expected

    def wider(args: list[Tensor]) -> list[Tensor | None]:
        return [torch.stack([args[0]]) * args[1]]  # the other one has more rows

    large = [torch.randn(300, 300), torch.randn(2, 300, 300)]
    graph = trace(wider, large).graph
    assert torch.equal(by_rows(graph)(*large)[0], wider(large)[0])


@pytest.mark.parametrize("order", [1, -1])
def test_a_sum_with_a_large_product_is_apart_from_it(order: int) -> None:
    def sums(args: list[Tensor]) -> list[Tensor | None]:
        x, a, b, bias = args
        return [torch.add(*[x, (a @ b).t()][::order]), bias + a @ b, a[:3] @ b + x[:3]]

    args = [torch.randn(300, 300), torch.randn(300, 20), torch.randn(20, 300), torch.randn(300)]
    graph = trace(sums, args).graph
    expected = graph(*args)
    changed = apart(graph)
    assert targets(changed).count("aten.neg.default") == 1
    assert all(map(torch.equal, changed(*args), expected))
