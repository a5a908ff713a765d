"""Tensors in place of parameters and buffers, for a block: wherever they are used, and gone again afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_bilevel.modules.swap import Swapper
from lightning_bilevel.tree import Params
from tests.support.seeds import seeded


class Tied(nn.Module):
    """Two layers with one weight, which their owner knows by a third name, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.weight = self.first.weight
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()) + self.shift + self.weight.sum()


def others(net: nn.Module) -> Params:
    """Return tensors of the same names and shapes."""
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    return {name: torch.full_like(tensor, 0.5) for name, tensor in tensors.items()}


@pytest.mark.parametrize("build", [Tied, lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))])
def test_it_does_what_functional_call_does(build: Callable[[], nn.Module]) -> None:
    net, x = seeded(build).eval(), torch.randn(4, 3)
    tensors = others(net)
    with Swapper(net).swapped(tensors):
        found = net(x)
    assert torch.equal(found, functional_call(net, tensors, (x,)))
    assert not torch.equal(found, net(x))


def test_every_place_of_a_tied_weight_gets_the_tensor() -> None:
    net = seeded(Tied)
    swapper, (name, _) = Swapper(net), next(net.named_parameters())
    tensor = torch.zeros(3, 3)
    with swapper.swapped({name: tensor}):
        assert net.weight is net.first.weight is net.second.weight is swapper.current(name) is tensor
    assert swapper.current(name) is net.weight


def test_blocks_nest_and_end_as_they_began_also_after_an_error() -> None:
    net = seeded(Tied)
    swapper, objects = Swapper(net), {name: id(tensor) for name, tensor in net.state_dict(keep_vars=True).items()}
    outer, inner = others(net), {"first.bias": torch.zeros(3)}

    def fail() -> None:
        with swapper.swapped(inner):
            assert net.first.bias is inner["first.bias"]
            assert net.shift is outer["shift"]
        assert net.first.bias is outer["first.bias"]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), swapper.swapped(outer):
        fail()
    assert {name: id(tensor) for name, tensor in net.state_dict(keep_vars=True).items()} == objects


def test_a_name_that_is_not_there_leaves_nothing_in_place() -> None:
    net = seeded(Tied)
    bias = net.first.bias
    with (
        pytest.raises(KeyError, match="first.bais"),
        Swapper(net).swapped({"first.bias": bias + 1, "first.bais": bias}),
    ):
        raise AssertionError
    assert net.first.bias is bias


def test_what_stands_there_now_is_looked_up_at_every_call() -> None:
    """A move to a device may make new parameters; what a module replaces its buffers by counts too."""
    net = seeded(Tied)
    swapper = Swapper(net)
    net.first.bias = nn.Parameter(torch.zeros(3))
    net.shift = torch.zeros(3)
    assert swapper.current("first.bias") is net.first.bias
    assert swapper.current("shift") is net.shift
