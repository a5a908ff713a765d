"""The audit compares with finite differences as closely as their rounding allows, and allows for kinks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, Episode, ReverseUnroll
from tests.support.audits import quiet

F32, F64 = torch.float32, torch.float64


def off_by(share: float) -> Callable[[Tensor], Tensor]:
    """Return the exponential with first derivatives that are right and second ones that are ``1 + share`` times so."""

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return (1 + share) * grad * ctx.saved_tensors[0].exp()

    class Exponential(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * Derivative.apply(ctx.saved_tensors[0])

    return Exponential.apply


def first_off_by(share: float) -> Callable[[Tensor], Tensor]:
    """Return the identity with a first derivative of ``1 + share``."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return (1 + share) * grad

    return Identity.apply


class Kept(torch.autograd.Function):
    """e^2x, whose backward reads an intermediate result as if it were constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.exp()
        return ctx.kept * ctx.kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2 * ctx.kept * ctx.kept


class Task(BilevelModule):
    """θ near data and near where a function of θ φ₀ pulls it.

    Args:
        pull: the function.
        of_phi: a function of φ₀ before that.
    """

    def __init__(self, pull: Callable[[Tensor], Tensor], of_phi: Callable[[Tensor], Tensor] = torch.clone) -> None:
        super().__init__(inner_steps=3, inner_start="reset")
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(3, generator=generator))
        self.p = nn.Parameter(torch.tensor([1.5, -1.0]))
        self.pull, self.of_phi = pull, of_phi

    def inner_parameters(self) -> Any:
        return [self.w]

    def inner_loss(self, x: Tensor) -> Tensor:
        return self.pull(self.w * self.of_phi(self.p[0])).sum() + (self.w - x).square().sum() * self.p[1].exp()

    def outer_loss(self, x: Tensor) -> Tensor:
        return (self.w - x).square().sum()

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)


def verdict(module: BilevelModule, dtype: torch.dtype) -> str:
    x = torch.linspace(-1, 1, 3, dtype=dtype)
    return quiet(module.to(dtype), Episode([x], x.flip(0)), [ReverseUnroll()])["ReverseUnroll"].verdict


@pytest.mark.parametrize(
    ("dtype", "share", "expected"),
    [
        (F64, 0.0, "yes"),
        (F64, 1e-3, "doubtful"),
        (F64, 0.01, "doubtful"),
        (F64, 0.05, "doubtful"),
        (F64, 0.15, "doubtful"),
        (F32, 0.0, "yes"),
        (F32, 0.001, "yes"),  # float32 does not tell
        (F32, 0.15, "doubtful"),
        (F32, -0.15, "doubtful"),
    ],
)
def test_a_second_derivative_that_is_off(dtype: torch.dtype, share: float, expected: str) -> None:
    assert verdict(Task(off_by(share)), dtype) == expected


@pytest.mark.parametrize(
    ("dtype", "share", "expected"),
    [(F64, 0.0, "yes"), (F64, 0.01, "doubtful"), (F64, 0.05, "doubtful"), (F32, 0.0, "yes"), (F32, 0.15, "doubtful")],
)
def test_a_derivative_with_respect_to_phi_alone_that_is_off(dtype: torch.dtype, share: float, expected: str) -> None:
    assert verdict(Task(torch.exp, first_off_by(share)), dtype) == expected


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    ("pull", "of_phi", "expected"),
    [
        (Kept.apply, torch.clone, "doubtful"),
        (lambda x: x.detach() * x, torch.clone, "doubtful"),
        (torch.exp, torch.detach, "doubtful"),
        (torch.exp, lambda p: p + (p.exp() - p).detach(), "doubtful"),
        # The steps follow this gradient: what they iterate has the derivative that is taken.
        (lambda x: x + (x.tanh() - x).detach(), torch.clone, "yes"),
        (lambda x: x.clamp(-0.1, 0.2), torch.clone, "yes"),
        (torch.relu, lambda p: p - p.detach(), "yes"),  # φ lies on the kink
        (torch.abs, lambda p: p - p.detach(), "yes"),
    ],
    ids=["kept", "detached", "detached φ", "straight through φ", "straight through θ", "clamp", "on a kink", "abs"],
)
def test_other_members_of_the_kind(
    pull: Callable[[Tensor], Tensor], of_phi: Callable[[Tensor], Tensor], expected: str, dtype: torch.dtype
) -> None:
    assert verdict(Task(pull, of_phi), dtype) == expected


@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16], ids=str)
def test_the_coarsest_dtype_of_the_computation_counts(half: torch.dtype) -> None:
    assert verdict(Task(lambda x: x.to(half).to(x.dtype).exp()), F64) == "yes"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.Hardtanh], ids=lambda act: act.__name__)
def test_wide_nets_with_many_kinks_are_not_doubted(act: type[nn.Module], dtype: torch.dtype, seed: int) -> None:
    class Wide(BilevelModule):
        def __init__(self) -> None:
            super().__init__(inner_steps=5, inner_start="reset")
            self.net = nn.Sequential(nn.Linear(6, 64), act(), nn.BatchNorm1d(64), nn.Linear(64, 64), act())
            self.weights = nn.Parameter(torch.randn(16))

        def inner_parameters(self) -> Any:
            return list(self.net.parameters())[2:]  # the first layer is an outer one

        def inner_loss(self, batch: Any) -> Tensor:
            return (self.weights.sigmoid() * (self.net(batch[0]).sum(1) - batch[1]).square()).mean()

        def outer_loss(self, batch: Any) -> Tensor:
            return (self.net(batch[0]).sum(1) - batch[1]).square().mean()

        def configure_inner_optimizer(self) -> Any:
            return SGD(lr=0.01)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batches = [(torch.randn(16, 6, dtype=dtype), torch.randn(16, dtype=dtype)) for _ in range(2)]
        report = quiet(Wide().to(dtype), Episode(batches[:1], batches[1]), [ReverseUnroll()], seed=seed)
    assert report["ReverseUnroll"].verdict == "yes"
