"""What hooks return: taken as it is where it is right, and refused by name where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.modules.returned import named, refuse_learned, refuse_scheduled, scalar, step_weights
from lightning_bilevel.testing import Quadratic

NET = nn.Linear(2, 1)
WEIGHT = {"weight": torch.ones(1, 2)}


def test_a_loss_is_a_number_or_the_one_in_a_mapping() -> None:
    loss = torch.tensor(2.0)
    assert scalar(NET, "inner_loss", loss) is loss
    assert scalar(NET, "inner_loss", {"loss": loss, "logits": torch.ones(3)}) is loss


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (torch.ones(2), r"a tensor of shape \(2,\)"),
        (1.0, "float"),
        (torch.tensor(3), "a tensor of torch.int64"),
        ({"logits": torch.ones(3)}, "dict"),
    ],
)
def test_other_losses_are_refused(loss: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"Linear\.outer_loss\(batch\).*{got}"):
        scalar(NET, "outer_loss", loss)


@pytest.mark.parametrize("weights", [[0.0, 1.0, 2.0], torch.tensor([0.0, 1.0, 2.0]), [0, torch.tensor(1.0), 2]])
def test_weights_are_a_number_a_step(weights: Any) -> None:
    found = step_weights(Quadratic(inner_steps=3), weights, torch.ones(1))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("weights", [[1.0], torch.ones(3, 1), [], 1.0, torch.ones(3, dtype=torch.complex64)])
def test_other_weights_are_refused(weights: Any) -> None:
    with pytest.raises(ValueError, match="outer_loss_weights"):
        step_weights(Quadratic(inner_steps=3), weights, torch.ones(1))


def test_parameters_come_in_order() -> None:
    expected = {"b": torch.zeros(1), "a": torch.zeros(2)}
    assert list(named(NET, "solve_inner(batches)", expected, {"a": torch.ones(2), "b": torch.ones(1)})) == ["b", "a"]


@pytest.mark.parametrize(
    "got",
    [{}, [torch.ones(1, 2)], {"weight": 1.0}, {"weight": torch.ones(2)}, {"weight": torch.ones(1, 2).double()}],
)
def test_other_parameters_are_refused(got: Any) -> None:
    with pytest.raises(ValueError, match=r"Linear\.solve_inner\(batches\)"):
        named(NET, "solve_inner(batches)", WEIGHT, got)


def test_what_would_not_follow_is_refused() -> None:
    optimizer = torch.optim.SGD(NET.parameters(), lr=0.1)
    refuse_learned(optimizer)
    refuse_scheduled(optimizer)
    with pytest.raises(MisconfigurationError, match="learned `lr`"):
        refuse_learned(torch.optim.SGD(NET.parameters(), lr=torch.tensor(0.1, requires_grad=True)))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(MisconfigurationError, match="scheduler"):
        refuse_scheduled(optimizer)
