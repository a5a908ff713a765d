"""Search and penalties from a formula, on problems whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

import hyperparameters as example
from tuning import baselines


@pytest.mark.parametrize("name", baselines.SEARCHES)
def test_a_search_finds_a_minimum_and_gets_over_divergence(name: str) -> None:
    def objective(point: Sequence[float]) -> float:
        return math.nan if point[1] > 0.9 else (point[0] - 2) ** 2 + (point[1] - 0.5) ** 2

    point, trials = baselines.SEARCHES[name](objective, [(0.0, 4.0), (0.0, 1.0)], seconds=0.3, seed=0)
    assert point == pytest.approx([2, 0.5], abs=0.5)
    assert trials > 5


def test_a_search_tries_one_point_at_least() -> None:
    _, trials = baselines.random_search(lambda point: point[0], [(0.0, 1.0)], seconds=0.0, seed=0)
    assert trials == 1


@pytest.mark.parametrize("name", baselines.SEARCHES)
def test_a_search_may_begin_at_a_point(name: str) -> None:
    tried: list[Sequence[float]] = []

    def objective(point: Sequence[float]) -> float:
        tried.append(point)
        return abs(point[0] - 0.3)

    best, _ = baselines.SEARCHES[name](objective, [(0.0, 1.0)], seconds=0.0, seed=0, first=[0.25])
    assert tried == [[0.25]]
    assert best == [0.25]


def test_features_that_say_nothing_are_penalized_more() -> None:
    data = example.noisy_digits(0)
    penalties = baselines.by_relevance(data.train.x, data.train.y)
    found = np.log(penalties(math.log(1e-3), 1.0))
    assert np.median(found[64:]) > np.median(found[:64])
    assert penalties(math.log(1e-3), 0.0) == pytest.approx(np.full(128, 1e-3))


def test_l1_solves_its_problem() -> None:
    """At a minimum no entry of the gradient is larger than the penalty."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(200, 6))
    y = (x[:, 0] + 0.3 * generator.normal(size=200) > 0).astype(int)
    model = baselines.l1(SimpleNamespace(x=x, y=y), 0.05)
    gradient = x.T @ (model.predict_proba(x)[:, 1] - y) / len(y)
    assert np.abs(gradient).max() <= 0.05 * 1.02
    assert (model.coef_[0, 1:] == 0).sum() >= 4


def test_descent_by_hand_is_the_inner_run() -> None:
    """PyTorch's own SGD, and the module's inner optimizer at the same rate and momentum."""
    data = example.noisy_digits(0)
    module = example.LearningRate(*data.sizes, lr=0.3, momentum=0.7)
    ours = example.adapt(module, data)
    by_hand = example.descend(data, math.log(0.3), math.log(0.3), cosine=False, test=True)
    assert by_hand == {name: pytest.approx(value, rel=1e-3) for name, value in ours.items()}
    assert example.descend(data, math.log(0.3), math.log(0.3), cosine=True) != by_hand
