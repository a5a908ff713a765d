"""Peak memory of the forward gradient, in copies of θ, as the profiler counts tensors."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, Episode, ForwardGradient, hypergradient
from lightning_bilevel.calculus import tangents

LAYERS, WIDTH = 16, 128


class Deep(BilevelModule):
    """θ is 16 matrices, φ one scale; what a step keeps of its activations is small beside θ."""

    def __init__(self, momentum: float) -> None:
        super().__init__(inner_steps=4, inner_start="reset")
        self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        self.scale, self.momentum = nn.Parameter(torch.ones(())), momentum

    def inner_parameters(self) -> Any:
        return self.net

    def outer_parameters(self) -> Any:
        return [self.scale]

    def inner_loss(self, x: Tensor) -> Tensor:
        return (self.net(x) * self.scale).square().mean()

    def outer_loss(self, x: Tensor) -> Tensor:
        return self.net(x).square().mean()

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1, momentum=self.momentum)


@pytest.mark.parametrize(
    ("directions", "chunk", "momentum", "most"), [(1, 1, 0.0, 4), (4, 1, 0.0, 4), (4, 4, 0.0, 10), (1, 1, 0.9, 6)]
)
def test_copies_of_theta(
    directions: int, chunk: int, momentum: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """θ and ∇_θ g, and for each direction their tangents: 2 + 2c; and with momentum 1 + c more."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.setattr(tangents, "PART_BYTES", 1)
    module, x = Deep(momentum), torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
    strategy, episode = ForwardGradient(directions, chunk_size=chunk), Episode([x], x)
    hypergradient(module, strategy, episode)  # checks the losses
    tensor_peak = importlib.import_module("support.measure").tensor_peak
    _, peak = tensor_peak(lambda: hypergradient(module, strategy, episode))
    copies = peak / (LAYERS * WIDTH**2 * 4 / 2**20)
    assert copies < most + 0.7
