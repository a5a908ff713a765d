"""Which submodules can draw fresh values of their parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.modules.reset import check_all_drawn, reset_methods


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def test_methods_of_either_name() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.MultiheadAttention(1, 1), Scale())
    names = {name for name, _ in net.named_parameters()}
    found = {type(child).__name__: reset is not None for child, _, reset in reset_methods(net, names)}
    inside = "NonDynamicallyQuantizableLinear"  # of the attention
    assert found == {"Linear": True, "MultiheadAttention": True, inside: True, "Scale": False}


def test_what_nothing_draws_has_to_be_chosen() -> None:
    net = nn.Sequential(nn.Linear(1, 1), Scale())
    check_all_drawn(net, {"0.weight", "1.scale"}, {"1.scale"})
    check_all_drawn(net, {"0.weight"}, set())
    with pytest.raises(MisconfigurationError, match=r"`Scale` has no `reset_parameters\(\)`.*\['1.scale'\]"):
        check_all_drawn(net, {"0.weight", "1.scale"}, {"0.weight"})
