"""Batch norm with a double backward of our own, against plain operations to the third derivative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import Episode, ReverseUnroll, hypergradient
from lightning_bilevel.kernels import batch_norm
from lightning_bilevel.kernels.safe import differentiable_kernels
from tests.support.layers import derivatives, drawn
from tests.support.modules import Maml

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "(n, c)": (lambda: nn.BatchNorm1d(3), (5, 3)),
    "(n, c, l)": (lambda: nn.BatchNorm1d(3), (4, 3, 2)),
    "images": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 3)),
    "volumes": (lambda: nn.BatchNorm3d(2), (2, 2, 2, 1, 3)),
    "no scale": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 2, 3)),
    "no statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 3)),
    "cumulative statistics": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 2, 3)),
    "large eps": (lambda: nn.BatchNorm2d(3, eps=0.5), (4, 3, 2, 3)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (4, 3, 2, 3)),
    "instance norm, no scale": (lambda: nn.InstanceNorm1d(3), (4, 3, 5)),
    "instance norm, statistics": (lambda: nn.InstanceNorm2d(3, track_running_stats=True), (4, 3, 2, 3)),
    "evaluation": (lambda: nn.BatchNorm2d(3).eval(), (4, 3, 2, 3)),
}

LEFT_TO_PYTORCH = ("evaluation",)


def prepared(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    net, x = drawn(*NETS[name], dtype)
    return net, x.requires_grad_()


class Plain(nn.Module):
    """The same normalization in operations whose derivatives are in no doubt."""

    def __init__(self, net: nn.Module, each: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.each = net.weight, net.bias, net.eps, each

    def forward(self, x: Tensor) -> Tensor:
        over = [*range(2, x.dim())] if self.each else [0, *range(2, x.dim())]
        variance = x.var(over, keepdim=True, unbiased=False)
        y = (x - x.mean(over, keepdim=True)) / (variance + self.eps).sqrt()
        if self.weight is None:
            return y
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        return y * self.weight.view(shape) + self.bias.view(shape)


@pytest.mark.parametrize("name", [name for name in NETS if name not in LEFT_TO_PYTORCH])
def test_derivatives_up_to_the_third(name: str) -> None:
    net, x = prepared(name)
    expected = derivatives(Plain(net, name.startswith("instance")), x, 3)
    with differentiable_kernels(net):
        assert torch.batch_norm is not batch_norm.NATIVE
        found = derivatives(net, x, 3)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NETS)
def test_pytorchs_numbers_up_to_the_second(name: str) -> None:
    net, x = prepared(name)
    expected, statistics = derivatives(net, x, 2), [b.clone() for b in net.buffers()]
    net, x = prepared(name)
    with differentiable_kernels(net):
        found = derivatives(net, x, 2)
    for ours, theirs in zip([*found, *net.buffers()], [*expected, *statistics], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["images", "instance norm", "large eps"])
def test_finite_differences(name: str) -> None:
    net, x = prepared(name)
    with differentiable_kernels(net):
        assert torch.autograd.gradcheck(net, (x,))
        assert torch.autograd.gradgradcheck(net, (x,))


def test_single_precision_loses_no_more_than_pytorch() -> None:
    net, x = prepared("images")
    exact = derivatives(net, x, 2)
    net, x = prepared("images", torch.float32)
    theirs = derivatives(net, x, 2)
    with differentiable_kernels(net):
        ours = derivatives(net, x, 2)
    for value, other, right in zip(ours, theirs, exact, strict=True):
        error, allowed = ((v.double() - right).abs().max() for v in (value, other))
        assert error <= 4 * allowed + 1e-5


@pytest.mark.parametrize("name", ["images", *LEFT_TO_PYTORCH])
def test_whose_kernel_runs(name: str) -> None:
    net, x = prepared(name)
    with differentiable_kernels(net):
        node = type(net(x).grad_fn).__name__
    assert ("_BatchNorm" in node) == (name == "images")


def test_an_empty_batch() -> None:
    net, _ = prepared("images")
    with differentiable_kernels(net):
        assert net(torch.zeros(0, 3, 2, 2, dtype=torch.float64, requires_grad=True)).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions_are_left_to_pytorch(dtype: torch.dtype) -> None:
    net, x = prepared("images", torch.float32)
    low = x.detach().to(dtype)
    expected = net(low)
    with differentiable_kernels(net):
        torch.testing.assert_close(net(low), expected)


def test_one_hypergradient_whichever_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    module = Maml(net, nn.functional.cross_entropy, inner_steps=3, inner_start="reset").double()
    batch = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.randint(2, (6,))
    episode = Episode([batch], batch)
    ours = hypergradient(module, ReverseUnroll(), episode).grads
    monkeypatch.setattr(batch_norm, "_plain", lambda *_: False)
    theirs = hypergradient(module, ReverseUnroll(), episode).grads
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-12)
