"""Products of sums by fewer operations are the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lightning_bilevel.compiled.factored import factored, operations
from lightning_bilevel.compiled.graphs import trace
from lightning_bilevel.compiled.simplified import simplified

EXAMPLES, FEATURES, HIDDEN, STEPS = 30, 200, 150, 3
Args = list[Tensor]
Step = Callable[[Args, Args, Tensor], tuple[Args, Args]]
"""(parameters, momentum, learned rate), gradients and so on: the update, see :func:`run`."""


def gradient_descent(theta: Args, grads: Args, buffers: Args, rate: Tensor) -> tuple[Args, Args]:
    return [p - 0.1 * g for p, g in zip(theta, grads, strict=True)], buffers


def momentum(theta: Args, grads: Args, buffers: Args, rate: Tensor) -> tuple[Args, Args]:
    buffers = [0.9 * b + g for b, g in zip(buffers, grads, strict=True)]
    return [p - 0.05 * b for p, b in zip(theta, buffers, strict=True)], buffers


def learned_rate(theta: Args, grads: Args, buffers: Args, rate: Tensor) -> tuple[Args, Args]:
    return [torch.sub(p * (1 - 0.01 * rate), rate * g) for p, g in zip(theta, grads, strict=True)], buffers


def clipped(theta: Args, grads: Args, buffers: Args, rate: Tensor) -> tuple[Args, Args]:
    size = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    return [p - 0.5 * g / (1 + size) for p, g in zip(theta, grads, strict=True)], buffers


def learned_decay(theta: Args, grads: Args, buffers: Args, rate: Tensor) -> tuple[Args, Args]:
    penalty = rate.exp() / 2 * torch.stack([p.square().sum() for p in theta]).sum()
    more = torch.autograd.grad(penalty, theta, create_graph=True)
    return [p - 0.1 * (g + h) for p, g, h in zip(theta, grads, more, strict=True)], buffers


UPDATES = {f.__name__: f for f in (gradient_descent, momentum, learned_rate, learned_decay, clipped)}


def scores(theta: Args, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, *theta[:2]).tanh(), theta[2])


def scores_by_product(theta: Args, x: Tensor) -> Tensor:
    return (theta[2] @ (theta[0] @ x.T + theta[1][:, None]).tanh()).T


def run(update: Any, net: Any, decay: float, batches: int) -> Callable[[Args], list[Tensor]]:
    """Return some steps with what is needed of them: the end, the inner losses, and the gradient of ⟨end, v⟩."""

    def steps(args: Args) -> list[Tensor]:
        begin = [arg.detach().requires_grad_() for arg in args[:4]]
        theta, rate, v, *x = begin[:3], begin[3], args[4], *args[5:]
        buffers, losses = [torch.zeros_like(p) for p in theta], list[Tensor]()
        for number in range(STEPS):
            loss = F.softplus(net(theta, x[number % batches])).mean()
            loss = loss + decay / 2 * torch.stack([p.square().sum() for p in theta]).sum()
            grads = list(torch.autograd.grad(loss, theta, create_graph=True))
            theta, buffers = update(theta, grads, buffers, rate)
            losses.append(loss)
        found = torch.autograd.grad((theta[0] * v).sum(), begin, allow_unused=True)
        return [*(p.detach() for p in (*theta, *losses)), *(g for g in found if g is not None)]

    return steps


def arguments(batches: int = 1, dtype: torch.dtype = torch.float64) -> Args:
    generator = torch.Generator().manual_seed(0)
    weights, inputs = (HIDDEN, FEATURES), (EXAMPLES, FEATURES)
    shapes = [weights, (HIDDEN,), (10, HIDDEN), (), weights, *[inputs] * batches]
    scale = [FEATURES**-0.5, 1.0, HIDDEN**-0.5, 0.1, 1.0, *[1.0] * batches]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(s * value).to(dtype) for s, value in zip(scale, drawn, strict=True)]


def changed(function: Callable[[Args], list[Tensor]], args: Args) -> tuple[fx.GraphModule, float]:
    """Return the factored graph, and how many of the operations of its products are left."""
    graph = simplified(trace(function, args).graph)
    before = operations(graph)
    graph = factored(graph)
    return graph, operations(graph) / before


def assert_same(
    graph: fx.GraphModule, function: Callable[[Args], list[Tensor]], args: Args, rtol: float = 1e-9
) -> None:
    for found, expected in zip(graph(*args), function(args), strict=True):
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bilevel.compiled.factored.LEAST_OPERATIONS", 0)


@pytest.mark.parametrize("decay", [0.0, 0.2], ids=["", "decay"])
@pytest.mark.parametrize("net", [scores, scores_by_product])
@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_steps_on_one_batch_take_fewer_operations(update: Any, net: Any, decay: float) -> None:
    function, args = run(update, net, decay, 1), arguments()
    graph, left = changed(function, args)
    assert left < (0.6 if update in (gradient_descent, momentum) else 0.9)  # others are needed for derivatives by rates
    assert_same(graph, function, args)


@pytest.mark.parametrize("update", [gradient_descent, momentum])
def test_steps_on_other_batches_are_left_alone(update: Any) -> None:
    function, args = run(update, scores, 0.2, STEPS), arguments(STEPS)
    graph, left = changed(function, args)
    assert left == 1
    assert_same(graph, function, args)


def test_one_step_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "STEPS", 1)
    function, args = run(gradient_descent, scores, 0.2, 1), arguments()
    graph, left = changed(function, args)
    assert left == 1
    assert_same(graph, function, args)


def test_more_examples_than_features_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "EXAMPLES", 500)
    function, args = run(gradient_descent, scores, 0.2, 1), arguments()
    graph, left = changed(function, args)
    assert left > 0.9
    assert_same(graph, function, args)


def scores_of_each(theta: Args, x: Tensor) -> Tensor:
    return torch.baddbmm(theta[1][:, None], x, theta[0].mT).tanh() @ theta[2].mT


def rates_of_each(theta: Args, grads: Args, buffers: Args, rate: Tensor) -> tuple[Args, Args]:
    return [p - rate.view(-1, *[1] * (p.ndim - 1)) * g for p, g in zip(theta, grads, strict=True)], buffers


@pytest.mark.parametrize("update", [gradient_descent, rates_of_each])
def test_stacked_episodes(update: Any) -> None:
    function = run(update, scores_of_each, 0.2, 1)
    args = [torch.stack([arg, 1.1 * arg]) for arg in arguments()]
    graph, left = changed(function, args)
    assert left < 0.8
    assert_same(graph, function, args)


def test_float32_is_as_exact_as_it_was() -> None:
    function, args = run(momentum, scores, 0.2, 1), arguments(dtype=torch.float32)
    exact = [value.float() for value in function([arg.double() for arg in args])]
    graph, _ = changed(function, args)
    for found, eager, expected in zip(graph(*args), function(args), exact, strict=True):
        assert (found - expected).norm() <= 3 * (eager - expected).norm() + 1e-6 * expected.norm()


def test_half_precision_is_left_alone() -> None:
    function, args = run(gradient_descent, scores, 0.0, 1), arguments(dtype=torch.bfloat16)
    graph = simplified(trace(function, args).graph)
    before = [node.target for node in graph.graph.nodes]
    assert [node.target for node in factored(graph).graph.nodes] == before


def test_a_factor_goes_to_the_smaller_side() -> None:
    x, w = torch.randn(3, 20), torch.randn(20, 30)

    def products(args: Args) -> list[Tensor]:
        return [args[0] @ (2 * args[1]), (2 * args[0]) @ args[1]]

    graph, _ = changed(products, [x, w])
    assert [node.target for node in graph.graph.nodes].count(torch.ops.aten.mm.default) == 1
    assert_same(graph, products, [x, w], 1e-5)


def test_small_products_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bilevel.compiled.factored.LEAST_OPERATIONS", 10**9)
    _, left = changed(run(gradient_descent, scores, 0.0, 1), arguments())
    assert left > 0.6


def test_deep_sums_are_not_followed_forever() -> None:
    def deep(args: Args) -> list[Tensor]:
        w, x, d = args
        for _ in range(400):
            w = w + 0.1 * (d @ x) * w.mean() + w
        return [x.T @ w]

    args = [torch.randn(20, 30), torch.randn(20, 30), torch.randn(20, 20)]
    graph = simplified(trace(deep, args).graph)
    assert operations(factored(graph)) > 0
