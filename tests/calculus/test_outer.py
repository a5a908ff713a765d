"""The outer loss at θ_T: its value, both its gradients, and what it left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bilevel.calculus import outer_value, outer_value_and_grads
from lightning_bilevel.problem import InnerState
from lightning_bilevel.tree import Params
from tests.support.problems import assert_close, draw
from tests.support.pure import EPISODE, PROBLEM

STATE = InnerState({"w": draw(3, seed=1), "shared": draw(2, seed=2)})
PHI = {"shared": draw(2, seed=3), "p": draw(3, seed=4), "unused": draw(1, seed=5)}


def loss(theta: Params, phi: Params, batch: Any, buffers: Params) -> Tensor:
    return (theta["w"] * phi["p"]).sum() + theta["shared"].square().sum() + 3 * phi["shared"].sum()


def evaluated(function: Any) -> Any:
    return outer_value_and_grads(replace(PROBLEM, outer_loss=function), STATE, PHI, EPISODE)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_gradients_of_both_levels_also_of_a_name_that_is_in_both(grad_mode: bool) -> None:
    with torch.set_grad_enabled(grad_mode):
        value, d, c, _ = evaluated(loss)
    assert value == loss(STATE.params, PHI, None, {})
    assert not value.requires_grad
    assert_close(d, {"w": PHI["p"], "shared": 2 * STATE.params["shared"]})
    ones, zeros = torch.ones(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert_close(c, {"shared": 3 * ones, "p": STATE.params["w"], "unused": zeros})


def test_a_loss_without_a_gradient_has_zeros() -> None:
    value, d, c, _ = evaluated(lambda theta, *_: theta["w"].sign().sum().detach())
    assert value == STATE.params["w"].sign().sum()
    assert_close(d, {name: torch.zeros_like(tensor) for name, tensor in STATE.params.items()})
    assert_close(c, {name: torch.zeros_like(tensor) for name, tensor in PHI.items()})


def test_a_value_alone_lets_the_loss_take_gradients_of_its_own() -> None:
    def steep(theta: Params, phi: Params, batch: Any, buffers: Params) -> Tensor:
        (slope,) = torch.autograd.grad(theta["w"].square().sum(), theta["w"])
        return slope.sum()

    with torch.no_grad():
        value, _ = outer_value(replace(PROBLEM, outer_loss=steep), STATE, PHI, EPISODE)
    assert value == 2 * STATE.params["w"].sum()
    assert not value.requires_grad


class Notes:
    """Observes how many evaluations there have been."""

    def __init__(self) -> None:
        self.evaluations = 0

    def loss(self, *args: Any) -> Tensor:
        self.evaluations += 1
        return loss(*args)

    def observe(self) -> int:
        return self.evaluations


def test_what_an_evaluation_left_behind_comes_with_it() -> None:
    notes = Notes()
    problem = replace(PROBLEM, outer_loss=notes.loss, observer=notes)
    assert outer_value_and_grads(problem, STATE, PHI, EPISODE).observed == 1
    assert outer_value(problem, STATE, PHI, EPISODE)[1] == 2
