"""The parts of a module are those that PyTorch yields, in its order."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_bilevel.modules.parts import parts


def test_shared_and_missing_children() -> None:
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared), nn.ModuleDict({"a": nn.Identity(), "b": shared}))
    net.register_module("nothing", None)
    assert parts(net) == list(net.modules())
    assert len(parts(net)) == len(set(parts(net)))


@pytest.mark.parametrize("net", [nn.TransformerEncoderLayer(8, 2, 8), nn.LSTM(2, 2), nn.ReLU()])
def test_as_pytorch_yields_them(net: nn.Module) -> None:
    assert parts(net) == list(net.modules())


def test_modules_that_contain_each_other() -> None:
    a, b = nn.Module(), nn.Module()
    a.b, b.a = b, a
    assert parts(a) == list(a.modules()) == [a, b]
