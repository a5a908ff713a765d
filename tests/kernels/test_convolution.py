"""Convolutions with a double backward of our own, against PyTorch's to the third derivative."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

from lightning_bilevel import Episode, ForwardGradient, ReverseUnroll, hypergradient
from lightning_bilevel.kernels import convolution
from lightning_bilevel.kernels.safe import differentiable_kernels
from tests.support.layers import derivatives, drawn
from tests.support.modules import Maml

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "sequences": (lambda: nn.Conv1d(2, 3, 2), (2, 2, 5)),
    "images": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 2, 4, 5)),
    "volumes": (lambda: nn.Conv3d(1, 2, 2), (2, 1, 3, 2, 3)),
    "strides": (lambda: nn.Conv2d(2, 3, 3, stride=(2, 1), padding=(1, 0)), (2, 2, 6, 5)),
    "holes": (lambda: nn.Conv2d(2, 3, 2, dilation=2), (2, 2, 5, 4)),
    "groups": (lambda: nn.Conv2d(4, 6, 2, groups=2), (2, 4, 3, 3)),
    "no shift": (lambda: nn.Conv2d(2, 3, 2, bias=False), (2, 2, 3, 3)),
    "reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 3, 3)),
    "same": (lambda: nn.Conv2d(2, 3, 3, padding="same"), (2, 2, 3, 3)),
    "one image": (lambda: nn.Conv2d(2, 3, 2), (2, 3, 3)),
}

LEFT_TO_PYTORCH = ("same", "one image")


def prepared(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    return drawn(*NETS[name], dtype)


@pytest.mark.parametrize("of", ["input and parameters", "parameters", "input", "shift"])
@pytest.mark.parametrize("name", NETS)
def test_derivatives_up_to_the_third(name: str, of: str) -> None:
    net, x = prepared(name)
    inputs = [x] if of.startswith("input") else []
    inputs += list(net.parameters()) if of.endswith("parameters") else []
    inputs += [net.weight if net.bias is None else net.bias] if of == "shift" else []
    for value in (x, *net.parameters()):
        value.requires_grad_(any(value is wanted for wanted in inputs))
    expected = derivatives(net, x, 3, inputs)
    with differentiable_kernels(net):
        assert F.conv2d is not convolution.NATIVE[2]
        found = derivatives(net, x, 3, inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["strides", "groups", "holes"])
def test_finite_differences(name: str) -> None:
    net, x = prepared(name)
    x.requires_grad_()
    with differentiable_kernels(net):
        for through in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert through(lambda x, weight, bias: net._conv_forward(x, weight, bias), (x, net.weight, net.bias))


@pytest.mark.parametrize("name", NETS)
def test_whose_kernel_runs(name: str) -> None:
    net, x = prepared(name)
    with differentiable_kernels(net):
        node = type(net(x).grad_fn).__name__
    assert ("_Convolution" in node) == (name not in LEFT_TO_PYTORCH)


def test_numbers_of_other_libraries() -> None:
    net, x = prepared("images")
    expected = F.conv2d(x, net.weight, stride=2).detach()
    with differentiable_kernels(net):
        for two in (np.int64(2), torch.tensor(2), [2, 2]):
            assert torch.equal(F.conv2d(x, net.weight, stride=two), expected)


def test_dual_numbers_are_left_to_pytorch() -> None:
    """A loss may take derivatives in forward mode itself: autograd functions of ours have no ``jvp``."""
    nets = [(nn.Conv2d(3, 2, 2), torch.randn(2, 3, 4, 4)), (nn.BatchNorm1d(3), torch.randn(5, 3))]
    nets.append((nn.InstanceNorm1d(3), torch.randn(2, 3, 5)))
    for net, x in nets:

        def slope(net: nn.Module = net, x: torch.Tensor = x) -> torch.Tensor:
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(net(forward_ad.make_dual(x, x.cos()))).tangent

        expected = slope()
        with differentiable_kernels(net):
            torch.testing.assert_close(slope(), expected)


def test_other_surroundings_are_left_to_pytorch() -> None:
    net, x = prepared("images", torch.float32)
    low = x.to(torch.bfloat16)
    weights = torch.stack([net.weight.detach()] * 2)
    with differentiable_kernels(net):
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x).dtype == torch.bfloat16
        assert "_Convolution" not in type(F.conv2d(low, net.weight.to(low)).grad_fn).__name__
        found = vmap(lambda weight: F.conv2d(x, weight))(weights)
    torch.testing.assert_close(found[1], convolution.NATIVE[2](x, weights[1]))


@pytest.mark.parametrize("strategy", [ReverseUnroll(), ForwardGradient(2)], ids=["reverse", "forward"])
def test_one_hypergradient_in_fewer_operations(
    strategy: ReverseUnroll | ForwardGradient, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3, stride=2, padding=1)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 2))
    module = Maml(net, F.cross_entropy, inner_start="reset").double()
    batch = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.randint(2, (6,))

    def counted() -> tuple[dict[str, Tensor], int]:
        with FlopCounterMode(display=False) as counter:
            grads = hypergradient(copy.deepcopy(module), strategy, Episode([batch], batch)).grads
        return grads, counter.get_total_flops()

    ours, fewer = counted()
    monkeypatch.setattr(convolution, "_plain", lambda *_: False)
    theirs, more = counted()
    assert fewer < 0.95 * more
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-12)
