"""Nets with parts that PyTorch differentiates once only: what takes gradients alone takes them as they are.

Each estimate is compared with that of the same net in plain operations, and with a closed form elsewhere.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lightning_bilevel import Episode, FirstOrder, PenaltyGradient, ReverseUnroll, hypergradient
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.strategies.base import HypergradientStrategy
from tests.support.problems import Problem, assert_close, draw
from tests.support.seeds import forked

Part = Callable[[], nn.Module]


class Net(Problem):
    """A part, and a head after it; a weight for each of three rows of the inner batch.

    Args:
        part: makes the part, under a fixed seed.
        dtype: of everything.
    """

    def __init__(self, part: Part, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(inner_steps=3, inner_start="reset")
        with forked(3):
            self.head, self.part = nn.Linear(8, 2).to(dtype), part()
        self.weights, self.dtype_ = nn.Parameter(draw(3, seed=1).to(dtype)), dtype

    def outer_parameters(self):
        return [self.weights]

    def errors(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (self.head(self.part(x).mean(1)) - y).square().mean(1)

    def inner_loss(self, batch):
        return (self.errors(batch) * self.weights.sigmoid()).mean()

    def outer_loss(self, batch):
        return self.errors(batch).mean()

    def configure_inner_optimizer(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad and p is not self.weights], lr=0.1)

    def episode(self) -> Episode:
        inner, outer = ((draw(3, 4, 8, seed=s), draw(3, 2, seed=s + 1)) for s in (5, 7))
        cast = [tuple(value.to(self.dtype_) for value in each) for each in (inner, outer)]
        return Episode([cast[0]], cast[1])


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.mix, self.fused = nn.Linear(8, 8).double(), fused

    def forward(self, x: Tensor) -> Tensor:
        q = self.mix(x).unflatten(-1, (2, 4)).transpose(1, 2)
        if self.fused:
            return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        return ((q @ q.mT / 2).softmax(-1) @ q).transpose(1, 2).flatten(2)


class Flash(nn.Module):
    """The fused kernel by its own name, which no setting turns off."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.inner, self.fused = Attention(False), fused

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused:
            return self.inner(x)
        q = self.inner.mix(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return torch._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0].transpose(1, 2).flatten(2)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Squares(nn.Module):
    def __init__(self, square: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.square = nn.Linear(8, 8).double(), square

    def forward(self, x: Tensor) -> Tensor:
        return self.square(self.mix(x))


class Checkpointed(nn.Module):
    def __init__(self, stored: bool) -> None:
        super().__init__()
        self.inner, self.stored = Attention(False), stored

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.stored else checkpoint(self.inner, x, use_reentrant=False)


class Int8(nn.Module):
    """A frozen weight of 8 bits, with an adapter of rank 2 beside it."""

    def __init__(self, quantized: bool) -> None:
        super().__init__()
        weight, self.quantized = torch.randint(-100, 100, (8, 8)), quantized
        self.register_buffer("weight", weight.to(torch.int8) if quantized else 0.01 * weight.double())
        self.down, self.up = nn.Linear(8, 2).double(), nn.Linear(2, 8).double()

    def forward(self, x: Tensor) -> Tensor:
        frozen = 0.01 * self.weight.to(x.dtype) if self.quantized else self.weight
        return F.linear(x, frozen) + self.up(self.down(x))


PAIRS: dict[str, tuple[Part, Part]] = {
    "attention": (lambda: Attention(True), lambda: Attention(False)),
    "flash": (lambda: Flash(True), lambda: Flash(False)),
    "once differentiable": (lambda: Squares(Once.apply), lambda: Squares(torch.square)),
    "checkpoint": (lambda: Checkpointed(False), lambda: Checkpointed(True)),
    "int8": (lambda: Int8(True), lambda: Int8(False)),
}
STRATEGIES = {"forward": PenaltyGradient(50.0), "central": PenaltyGradient(50.0, "central"), "first": FirstOrder()}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("name", PAIRS)
def test_a_part_is_as_good_as_plain_operations(name: str, strategy: HypergradientStrategy) -> None:
    module, plain = (Net(part) for part in PAIRS[name])
    found, expected = (hypergradient(each, strategy, each.episode()) for each in (module, plain))
    assert_close(found.grads, expected.grads, 1e-8)
    torch.testing.assert_close(found.value, expected.value)


def test_second_order_strategies_cannot() -> None:
    flash, once = Net(PAIRS["flash"][0]), Net(PAIRS["once differentiable"][0])
    with pytest.raises(RuntimeError, match="flash_attention_for_cpu_backward"):
        hypergradient(flash, ReverseUnroll(), flash.episode())
    with pytest.raises(MisconfigurationError, match="^Cannot use `ReverseUnroll` with `Once`"):
        hypergradient(once, ReverseUnroll(), once.episode())


def test_layers_of_a_frozen_backbone_take_their_fast_path() -> None:
    """``TransformerEncoderLayer`` has one where nothing needs a gradient, and only if it may."""
    allowed: list[bool] = []

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(8, 8).double()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().requires_grad_(False).eval()

        def forward(self, x: Tensor) -> Tensor:
            allowed.append(torch.backends.mha.get_fastpath_enabled())
            with torch.no_grad():
                features = self.layer(x)
            return self.mix(features)

    module = Net(Encoder).eval()
    hypergradient(module, PenaltyGradient(), module.episode())
    assert set(allowed) == {True}
    allowed.clear()
    hypergradient(module, ReverseUnroll(), module.episode())
    assert set(allowed) == {False}


def test_a_dynamically_quantized_backbone() -> None:
    """It returns features that carry no graph; what is trained comes after it."""

    def quantized() -> nn.Module:
        net = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, and still what many have
            return nn.Sequential(torch.ao.quantization.quantize_dynamic(net, {nn.Linear}), nn.Linear(8, 8))

    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this PyTorch has no quantized kernels")
    module = Net(quantized, torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized.*")
        found = hypergradient(module, PenaltyGradient(50.0), module.episode()).grads["weights"]
        exact = hypergradient(module, ReverseUnroll(), module.episode()).grads["weights"]
    assert torch.cosine_similarity(found, exact, dim=0) > 0.9


@pytest.mark.parametrize(
    ("backend", "refusal"),
    [
        ("aot_eager", "compiled with non-empty donated buffers which requires create_graph=False"),
        pytest.param("inductor", "does not currently support double backward", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_part(backend: str, refusal: str) -> None:
    """It stays compiled, in every run; what is compiled has no double backward."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("the compiler of PyTorch needs g++, and there is none")
    torch.compiler.reset()
    module, plain = (Net(lambda compile=compile: compile(Squares(torch.square))) for compile in (_by(backend), _same))
    for strategy in (PenaltyGradient(50.0), PenaltyGradient(50.0, "central"), PenaltyGradient(50.0)):
        found, expected = (hypergradient(each, strategy, each.episode()) for each in (module, plain))
        torch.testing.assert_close(found.grads, expected.grads, rtol=1e-7, atol=1e-9)
    with pytest.raises(RuntimeError, match=refusal):
        hypergradient(module, ReverseUnroll(), module.episode())


def _by(backend: str) -> Callable[[nn.Module], nn.Module]:
    return lambda part: torch.compile(part, backend=backend)


def _same(part: nn.Module) -> nn.Module:
    return part
