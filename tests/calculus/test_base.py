"""What every step has, by a step that only says what it does: s ↦ A s + B φ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus import Condition, InnerStep
from lightning_bilevel.calculus.base import append_loss, condition
from lightning_bilevel.calculus.tangents import Pushed
from lightning_bilevel.problem import BilevelProblem, InnerState
from lightning_bilevel.tree import Params
from tests.support.problems import assert_close, draw

A, B = draw(3, 3, seed=1), draw(3, 2, seed=2)
STATE, PHI = InnerState({"w": draw(3, seed=3)}), {"p": draw(2, seed=4)}
CURVATURE = A @ A.T


def quadratic(theta: Params, phi: Params, batch: Any, buffers: Params) -> tuple[Tensor, Params]:
    return theta["w"] @ CURVATURE @ theta["w"] / 2 - theta["w"] @ B @ phi["p"], buffers


class Linear(InnerStep):
    """Batches are the losses."""

    def __init__(self) -> None:
        super().__init__(BilevelProblem(quadratic, lambda *_: torch.zeros(()), lambda *_: ({}, {}), 1))

    def __call__(self, state: InnerState, phi: Params, batch: Tensor) -> tuple[InnerState, Tensor]:
        return InnerState({"w": A @ state.params["w"] + B @ phi["p"]}, steps=state.steps + 1), batch

    def graph(self, state: InnerState, phi: Params, batches: Sequence[Tensor]) -> tuple[InnerState, list[Tensor]]:
        return self.run(state, phi, batches)

    def jvp(self, state: InnerState, phi: Params, batch: Tensor, tangents: Params, directions: Params) -> Pushed:
        after, loss = self(state, phi, batch)
        return Pushed(after, loss, {"w": tangents["w"] @ A.T + directions["p"] @ B.T})

    def fixed_point(self, state: InnerState, phi: Params, batch: Tensor) -> Condition:
        raise NotImplementedError


LOSSES = [torch.tensor(1.0), torch.tensor(2.0)]
THROUGH = A @ B + B
"""∂s_2/∂φ."""


def test_a_stretch_is_step_after_step() -> None:
    state, losses = Linear().run(STATE, PHI, LOSSES)
    assert state.steps == 2
    assert_close(state.params, {"w": A @ A @ STATE.params["w"] + THROUGH @ PHI["p"]})
    assert [loss.tolist() for loss in losses] == [[1.0], [2.0]]


def test_a_stretch_is_pulled_through_its_graph() -> None:
    pulled, d = Linear().vjp(STATE, PHI, LOSSES), draw(3, seed=5)
    back, through = pulled.pull({"w": d.clone()}, ["w"])
    assert_close(back, {"w": d @ A @ A})
    assert_close(through, {"p": d @ THROUGH})


def test_steps_that_are_held_pass_for_the_identity() -> None:
    pulled, d = Linear().held(STATE, PHI, LOSSES), {"w": draw(3, seed=5), "v": torch.ones(1)}
    assert_close(pulled.state.params, Linear().run(STATE, PHI, LOSSES)[0].params)
    back, through = pulled.pull(d, ["w"])
    assert list(back) == ["w"]
    assert_close(back, {"w": d["w"]})
    assert_close(through, tree.zeros_like(PHI))


def test_tangents_are_pushed_step_after_step() -> None:
    z, v = draw(4, 3, seed=6), draw(4, 2, seed=7)
    _, losses, tangents = Linear().push(STATE, PHI, LOSSES, {"w": z}, {"p": v})
    assert len(losses) == 2
    assert_close(tangents, {"w": z @ (A @ A).T + v @ THROUGH.T})


def test_no_step_is_one_graph_with_the_outer_loss_of_itself() -> None:
    assert Linear().whole(STATE, PHI, LOSSES, None) is None


def test_the_rule_alone_takes_the_inner_gradient_as_given() -> None:
    def update(params: Params, grads: Params, opt_state: Any, phi: Params, number: int) -> tuple[Params, Any]:
        assert number == 1
        return {"w": A @ params["w"] - phi["p"][0] * grads["w"]}, {}

    step, v = Linear(), draw(3, seed=9)
    step.problem = replace(step.problem, update=update)
    w, gradient, rate = STATE.params["w"], CURVATURE @ STATE.params["w"] - B @ PHI["p"], PHI["p"][0]
    ruled = step.rule(STATE, PHI, None)
    assert ruled.state.steps == 1
    assert_close(ruled.state.params, {"w": A @ w - rate * gradient})
    assert_close({"g": ruled.loss}, {"g": quadratic(STATE.params, PHI, None, {})[0]})
    by_gradient, by_theta, by_phi = ruled.pull({"w": v})
    assert_close(by_gradient, {"w": -rate * v})
    assert_close(by_theta, {"w": v @ A})
    assert_close(by_phi, {"p": torch.stack([-(v @ gradient), torch.zeros_like(rate)])})


def test_the_condition_of_the_inner_loss() -> None:
    found, v = Linear().stationarity(STATE, PHI, None), {"w": draw(3, seed=8)}
    assert_close(found.residual, {"w": CURVATURE @ STATE.params["w"] - B @ PHI["p"]})
    assert_close(found.transposed(v), {"w": CURVATURE @ v["w"]})
    assert_close(found.mixed(v), {"p": -v["w"] @ B})


def test_a_condition_that_depends_on_nothing_has_zeros_for_products() -> None:
    at, outer = tree.leaves(STATE.params), tree.leaves(PHI)
    found = condition({"w": torch.ones(3)}, at, outer)
    assert_close(found.transposed({"w": torch.ones(3)}), tree.zeros_like(at))
    assert_close(found.mixed({"w": torch.ones(3)}), tree.zeros_like(outer))


@pytest.mark.parametrize("count", [99, 100, 250])
def test_many_losses_are_joined(count: int) -> None:
    losses: list[Tensor] = []
    for number in range(count):
        append_loss(losses, torch.tensor(float(number)), None)
    assert torch.cat(losses).tolist() == list(range(count))
    assert len(losses) < 100
