"""What is done to graphs leaves them what they compute."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bilevel.compiled.graphs import trace
from lightning_bilevel.compiled.passes import cut, without_alpha


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


def test_a_factor_in_an_addition_is_written_out() -> None:
    args = [torch.randn(3), torch.randn(3)]
    for function in (torch.add, torch.sub):
        graph = trace(lambda args, function=function: [function(*args, alpha=0.5)], args).graph
        assert any("alpha" in node.kwargs for node in graph.graph.nodes)
        expected = function(*args, alpha=0.5)
        changed = without_alpha(graph)
        assert not any("alpha" in node.kwargs for node in changed.graph.nodes)
        torch.testing.assert_close(changed(*args)[0], expected)
