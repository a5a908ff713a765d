"""Peak memory of the forward gradient, in copies of θ, as the profiler counts tensors; and θ in parts."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, Episode, ForwardGradient, hypergradient
from lightning_bilevel.calculus import autodiff
from problems import INNER_OPTIMIZERS, Mlp, episodes

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
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.setattr(autodiff, "PART_BYTES", 1)
    module, x = Deep(momentum), torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
    strategy, episode = ForwardGradient(directions, chunk_size=chunk), Episode([x], x)
    hypergradient(module, strategy, episode)  # checks the losses
    tensor_peak = importlib.import_module("support.measure").tensor_peak
    _, peak = tensor_peak(lambda: hypergradient(module, strategy, episode))
    copies = peak / (LAYERS * WIDTH**2 * 4 / 2**20)
    assert copies < most + 0.7


@pytest.mark.parametrize("inner", sorted(INNER_OPTIMIZERS))
@pytest.mark.parametrize("learned", [False, True])
def test_an_update_in_parts_is_the_update(inner: str, learned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is one tensor and its slots, here; learned rates are pushed along with each."""
    strategy, parts = ForwardGradient(3), []

    def spied(*args: Any) -> list[list[str]]:
        parts.append(made(*args))
        return parts[-1]

    made = autodiff._parts
    monkeypatch.setattr(autodiff, "_parts", spied)
    whole = hypergradient(Mlp(inner, learned=learned), strategy, episodes(1))
    assert {len(each) for each in parts} == {1}
    parts.clear()
    monkeypatch.setattr(autodiff, "PART_BYTES", 1)
    cut = hypergradient(Mlp(inner, learned=learned), strategy, episodes(1))
    assert min(len(each) for each in parts) > 1
    assert all(torch.equal(value, cut.grads[name]) for name, value in whole.grads.items())
    assert all(torch.equal(value, cut.state.params[name]) for name, value in whole.state.params.items())
    assert cut.state.slots.keys() == whole.state.slots.keys()


def test_an_update_that_mixes_entries_gets_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autodiff, "PART_BYTES", 1)
    problem = Mlp("SGD", learned=False).functional().problem
    tangents = {"a": torch.zeros(1, 4), "b": torch.zeros(1, 4)}
    assert autodiff._parts(problem, tangents, ["a", "b"]) == [["a"], ["b"]]
    assert autodiff._parts(replace(problem, elementwise=False), tangents, ["a", "b"]) == [["a", "b"]]
