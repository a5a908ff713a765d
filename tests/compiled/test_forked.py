"""What a graph's function draws and puts back is drawn as in eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bilevel import MEHA, SGD, HypergradientStrategy, PenaltyGradient
from lightning_bilevel.compiled.forked import compiled_forks
from lightning_bilevel.compiled.graphs import trace
from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.randomness import RngState
from tests.support.compiled import CLASSES, FEATURES, apart, both, episode, needs_inductor, weighted

CPU = torch.device("cpu")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, CLASSES))


def noisy(module: Any, loss: Tensor) -> Tensor:
    return loss * (1 + torch.rand(()) + torch.randn(3).sum() * torch.bernoulli(torch.full((2,), 0.5)).sum())


STRATEGIES: dict[str, Callable[[], HypergradientStrategy]] = {
    "forward": lambda: PenaltyGradient(2.0),
    "central": lambda: PenaltyGradient(2.0, scheme="central"),
    "joint": lambda: MEHA(2.0),
}


def estimated(strategy: str, count: int = 2, **options: Any) -> float:
    module = weighted(net=net, optimizer=lambda module: SGD(lr=0.1, momentum=0.5), **options)
    module.log_lr.requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = apart(*both(module, STRATEGIES[strategy](), [episode(seed) for seed in range(count)]))
    assert not [each for each in caught if "not compiled" in str(each.message)]
    return found


@pytest.mark.parametrize("term", [lambda module, loss: loss, noisy], ids=["masks", "noise"])
@pytest.mark.parametrize("chunk", [1, 2], ids=["looped", "stacked"])
@pytest.mark.parametrize("strategy", ["forward", pytest.param("central", marks=pytest.mark.slow)])
def test_masks_of_both_losses(strategy: str, chunk: int, term: Any, calls: list[int]) -> None:
    assert estimated(strategy, term=term, episode_chunk_size=chunk) < 2e-6
    assert calls


def test_a_joint_step(calls: list[int]) -> None:
    assert estimated("joint", 1, inner_steps=1, inner_start="warm") < 2e-6
    assert calls


@pytest.mark.slow
@needs_inductor
@pytest.mark.usefixtures("by_inductor")
def test_by_inductor(calls: list[int]) -> None:
    assert estimated("forward", 1, inner_steps=1) < 2e-6
    assert calls


def drawn(function: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return what a function returns, three times in a row and then what is drawn next: as it is, and by its graph."""
    x = torch.arange(1.0, 7.0).reshape(2, 3)
    traced = trace(lambda args: [function(args[0])], [x])
    call = compiled_forks(traced.graph, [x], "flat", traced.forks)
    found = []
    for run in (function, lambda x: call([x])[0]):
        torch.manual_seed(1)
        found.append([*(run(x) for _ in range(3)), torch.rand(2)])
    return found[0], found[1]


def forked(x: Tensor) -> Tensor:
    x = F.dropout(x)
    with RngState(CPU).fork():
        x = x + torch.rand_like(x.t()).t()
    return x + torch.randn(3)


def within(x: Tensor) -> Tensor:
    with RngState(CPU).fork():
        x = x + torch.rand(3)
        with RngState(CPU).fork():
            x = x + torch.poisson(torch.full((3,), 2.0))
        x = x + torch.rand(3)
    return x + F.dropout(x, 0.3) + torch.randint(5, (3,))


def at_once(x: Tensor) -> Tensor:
    with RngState(CPU).fork():
        x = F.dropout(x)
    with RngState(CPU).fork():
        return x * F.dropout(x)


def vectorized(x: Tensor) -> Tensor:
    x = torch.vmap(F.dropout, randomness="different")(x)
    with RngState(CPU).fork():
        return x + torch.vmap(lambda x: x + torch.rand(3), randomness="same")(x)


def nothing(x: Tensor) -> Tensor:
    with RngState(CPU).fork():
        x = 2 * x
    return F.dropout(x)


@pytest.mark.parametrize("function", [forked, within, at_once, vectorized, nothing])
def test_draws_are_those_of_eager(function: Callable[[Tensor], Tensor]) -> None:
    for found, expected in zip(*drawn(function), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_forks_are_marked_where_something_is_put_back() -> None:
    def marks(function: Any) -> Sequence[Any]:
        return trace(lambda args: [function(args[0])], [torch.ones(2, 3)]).forks

    assert marks(forked) == [(True, 1), (False, 2), (False, 3)]
    assert marks(nothing) == ()


def by_numbers(x: Tensor) -> Tensor:
    with RngState(CPU).fork():
        return x + torch.poisson(x)


def in_turn(x: Tensor) -> Tensor:
    with RngState(CPU).fork():
        return x + torch.poisson(torch.rand(3))


@pytest.mark.parametrize("function", [by_numbers, in_turn])
def test_draws_by_numbers_that_are_computed_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotCompiled, match="what it draws, and puts back, depends on numbers that it computes"):
        drawn(function)


def test_draws_that_are_left_out_are_refused() -> None:
    def function(args: list[Tensor]) -> list[Tensor]:
        with RngState(CPU).fork():
            return [args[0] + torch.rand(3), args[0] * torch.rand(3)]

    traced = trace(function, [torch.ones(3)])
    part = traced.graph
    (output,) = [node for node in part.graph.nodes if node.op == "output"]
    output.args = ([output.args[0][0]],)
    for node in reversed(list(part.graph.nodes)):
        if node.op == "call_function" and not node.users:
            part.graph.erase_node(node)
    with pytest.raises(NotCompiled, match="leaves out some of what it draws"):
        compiled_forks(part, [torch.ones(3)], "flat", traced.forks)
