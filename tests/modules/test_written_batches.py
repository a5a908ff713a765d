"""What a loss writes to its batch, containers or tensors, is gone after the evaluation, or refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import PZOBO, SGD, BilevelModule, Episode, FirstOrder, ReverseUnroll, hypergradient
from lightning_bilevel.errors import MisconfigurationError
from tests.support.seeds import seeded


@dataclass
class Record:
    x: Tensor
    y: Tensor


class Graph:
    """As torch_geometric's: attributes beside each other."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


def moved(batch: Any) -> tuple[Tensor, Tensor]:
    """Write x and y back halved, each as the container lets one, and return what is there now."""
    if isinstance(batch, dict):
        batch["x"], batch["y"] = batch["x"] / 2, batch["y"] / 2
        return batch["x"], batch["y"]
    if isinstance(batch, list):
        batch[:] = [part / 2 for part in batch]
        return batch[0], batch[1]
    if isinstance(batch, tuple):
        batch[0]["x"] = batch[0]["x"] / 2
        return batch[0]["x"], batch[1]
    batch.x, batch.y = batch.x / 2, batch.y / 2
    return batch.x, batch.y


def scaled(batch: Any) -> tuple[Tensor, Tensor]:
    """Write to the tensors in place."""
    parts = [*batch.values()] if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else None
    x, y = parts if parts is not None else (batch.x, batch.y)
    return x.mul_(0.5), y.div_(2)


BATCHES = {
    "a dict": lambda x, y: {"x": x, "y": y},
    "a list": lambda x, y: [x, y],
    "a tuple with a dict": lambda x, y: ({"x": x}, y),
    "a dataclass": Record,
    "an object": Graph,
}
IN_PLACE = {name: BATCHES[name] for name in ("a dict", "a list", "a dataclass")} | {"a tuple": lambda x, y: (x, y)}
WRITES = [(moved, name, BATCHES[name]) for name in BATCHES] + [(scaled, name, IN_PLACE[name]) for name in IN_PLACE]


class Halving(BilevelModule):
    def __init__(self, change: Any) -> None:
        super().__init__(inner_steps=3, inner_start="reset")
        self.change = change
        self.net, self.log_penalty = nn.Linear(3, 1), nn.Parameter(torch.tensor(-1.0))

    def inner_parameters(self) -> Any:
        return self.net

    def outer_loss(self, batch: Any) -> Tensor:
        x, y = self.change(batch)
        return (self.net(x) - y).square().mean()

    def inner_loss(self, batch: Any) -> Tensor:
        return self.outer_loss(batch) + self.log_penalty.exp() * self.net.weight.square().sum()

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)


@pytest.mark.parametrize("strategy", [ReverseUnroll(), PZOBO(2)], ids=lambda strategy: type(strategy).__name__)
@pytest.mark.parametrize(
    ("change", "make"), [each[::2] for each in WRITES], ids=[f"{change.__name__}-{name}" for change, name, _ in WRITES]
)
def test_what_a_loss_writes_to_its_batch_is_gone_after_the_evaluation(change: Any, make: Any, strategy: Any) -> None:
    x, y = torch.linspace(-1, 1, 12).view(4, 3), torch.linspace(0, 2, 4).view(4, 1)

    def halved(batch: Any) -> tuple[Tensor, Tensor]:
        return batch[0] / 2, batch[1] / 2 if "tuple with" not in name else batch[1]

    name = next(each for _, each, found in WRITES if found is make)
    expected = hypergradient(seeded(lambda: Halving(halved)), strategy, Episode([(x, y)], (x, y)))
    batch, module = make(x.clone(), y.clone()), seeded(lambda: Halving(change))
    for _ in range(2):
        found = hypergradient(module, strategy, Episode([batch], batch))
        torch.testing.assert_close(found.grads, expected.grads)
        with module.adapted([batch]):
            torch.testing.assert_close(
                dict(module.named_parameters())["net.weight"], expected.state.params["net.weight"]
            )


def test_a_tensor_that_is_written_to_at_times_is_seen() -> None:
    calls = []

    def at_times(batch: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return (batch[0].mul_(0.5) if len(calls) > 3 else batch[0]), batch[1]

    x, y = torch.ones(4, 3), torch.ones(4, 1)
    with pytest.raises(
        MisconfigurationError, match=r"a loss of `Halving` that writes to a tensor of its batch at times"
    ):
        hypergradient(Halving(at_times), FirstOrder(), Episode([(x, y)], (x.clone(), y)))
