"""The losses of an inner run: the first bad one has its step, the last one is what is logged."""

from __future__ import annotations

import pytest
import torch

from lightning_bilevel.calculus.base import append_loss
from lightning_bilevel.calculus.runs import last_loss
from tests.support.problems import Mlp


@pytest.mark.parametrize("bad", [1, 99, 100, 101, 199, 200, 250])
def test_the_step_of_a_bad_loss_in_a_long_run(bad: int) -> None:
    made, losses = Mlp("SGD", learned=False).functional().problem, []
    for step in range(1, 251):
        append_loss(losses, torch.tensor(float("nan") if step == bad else float(step)))
    assert len(losses) < 150  # else nothing is put together
    with pytest.raises(FloatingPointError, match=rf"the inner loss at step {bad} of "):
        last_loss(made, losses)


def test_the_last_loss_of_a_long_run() -> None:
    made, losses = Mlp("SGD", learned=False).functional().problem, []
    for step in range(250):
        append_loss(losses, torch.tensor(float(step)))
    assert last_loss(made, losses)["inner_loss"] == 249
