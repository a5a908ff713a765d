"""A module as pure functions: how many copies of it go into one vectorized call, and what is looped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bilevel.modules import functional
from lightning_bilevel.modules.functional import FEWEST_COPIES, STACKED_ENTRIES


@pytest.mark.parametrize(
    ("net", "entries", "copies"),
    [
        (nn.Linear(1, 1), 2, STACKED_ENTRIES // 2),
        (nn.Linear(1, 1), STACKED_ENTRIES // FEWEST_COPIES, FEWEST_COPIES),
        (nn.Linear(1, 1), STACKED_ENTRIES // FEWEST_COPIES + 1, 1),
        (nn.Conv1d(1, 1, 1), 2, 1),
    ],
)
def test_copies_of_a_net(net: nn.Module, entries: int, copies: int) -> None:
    theta = {"w": torch.zeros(1).expand(entries)}
    assert functional._vectorizable(net, theta) == copies
