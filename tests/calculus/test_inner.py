"""The inner loss at a state: the mean over batches, each of which is evaluated once, and its gradients."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bilevel.calculus.inner import inner_value_and_grads
from lightning_bilevel.problem import InnerState
from lightning_bilevel.tree import Params
from tests.support.problems import assert_close, draw
from tests.support.pure import PROBLEM

STATE = InnerState({"w": draw(3, seed=1), "shared": draw(2, seed=2)})
PHI = {"shared": draw(2, seed=3), "p": draw(3, seed=4), "unused": draw(1, seed=5)}
BATCHES = [torch.tensor(value, dtype=torch.float64) for value in (2.0, 5.0)]
seen: Counter[float] = Counter()


def loss(theta: Params, phi: Params, batch: Any, buffers: Params) -> tuple[Tensor, Params]:
    seen[float(batch)] += 1
    return batch * (theta["w"] * phi["p"]).sum() + theta["shared"].square().sum() + 3 * phi["shared"].sum(), {}


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize(("order", "mean"), [((0,), 2.0), ((0, 1), 3.5), ((0, 1, 0), 3.0), ((0, 0), 2.0)], ids=str)
def test_it_is_the_mean_over_batches(order: tuple[int, ...], mean: float, grad_mode: bool) -> None:
    seen.clear()
    batches = [BATCHES[number] for number in order]
    with torch.set_grad_enabled(grad_mode):
        value, d, c = inner_value_and_grads(replace(PROBLEM, inner_loss=loss), STATE, PHI, batches)
    assert set(seen.values()) == {1}
    expected, _ = loss(STATE.params, PHI, mean, {})
    torch.testing.assert_close(value, expected)
    assert not value.requires_grad
    assert_close(d, {"w": mean * PHI["p"], "shared": 2 * STATE.params["shared"]})
    ones, zeros = torch.ones(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert_close(c, {"shared": 3 * ones, "p": mean * STATE.params["w"], "unused": zeros})


def test_the_gradient_by_inner_parameters_is_left_out_on_request() -> None:
    problem = replace(PROBLEM, inner_loss=loss)
    both, one = (inner_value_and_grads(problem, STATE, PHI, BATCHES, by_theta=each) for each in (True, False))
    assert one.d == {}
    assert_close(one.c, both.c)


def test_batches_that_are_none_count_as_well() -> None:
    def without(theta: Params, phi: Params, batch: None, buffers: Params) -> tuple[Tensor, Params]:
        return theta["w"].square().sum() * phi["p"].sum(), {}

    d = inner_value_and_grads(replace(PROBLEM, inner_loss=without), STATE, PHI, [None, None]).d
    assert_close({"w": d["w"]}, {"w": 2 * STATE.params["w"] * PHI["p"].sum()})
