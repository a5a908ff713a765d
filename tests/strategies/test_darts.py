"""DARTS against truncated reverse mode: exact on a quadratic, of second order in the radius elsewhere."""

from __future__ import annotations

import pytest

from lightning_bilevel import DARTS, ReverseUnroll, TruncatedReverse, hypergradient, tree
from lightning_bilevel.problem import Episode
from tests.support.problems import INNER_OPTIMIZERS, Mlp, NoisyMlp, Problem, Quadratic, assert_close, episodes


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("radius", [1e-3, 1.0, 100.0])
def test_it_is_exact_on_a_quadratic(radius: float, shared: bool) -> None:
    module = Quadratic(inner_steps=1, shared=shared)
    exact = hypergradient(module, ReverseUnroll(), module.episode()).grads
    assert_close(hypergradient(module, DARTS(radius), module.episode()).grads, exact, 1e-9)
    long = Quadratic(inner_steps=5, momentum=0.6, shared=shared)
    last = hypergradient(long, TruncatedReverse(1), long.episode()).grads
    assert_close(hypergradient(long, DARTS(radius), long.episode()).grads, last, 1e-9)


def off(module: Problem, radius: float, episode: Episode) -> float:
    exact = hypergradient(module, TruncatedReverse(1), episode).grads
    found = hypergradient(module, DARTS(radius), episode).grads
    return float(tree.norm(tree.sub(found, exact)) / tree.norm(exact))


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("inner", INNER_OPTIMIZERS)
def test_it_tends_to_the_last_step_of_any_optimizer(inner: str, shared: bool) -> None:
    module, (episode,) = Mlp(inner, shared), episodes(1)
    coarse, fine = (off(module, radius, episode) for radius in (0.1, 0.01))
    assert fine < 1e-4
    assert coarse / fine == pytest.approx(100, rel=0.1)


def test_both_sides_have_the_masks_of_the_step() -> None:
    module, (episode,) = NoisyMlp(), episodes(1)
    assert off(module, 1e-3, episode) < 1e-5
