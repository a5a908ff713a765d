"""What the audit sees beside estimates: what is saved, what can be vectorized, an outer loss without a gradient."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bilevel import Episode, ReverseUnroll
from tests.support.audits import EPISODE, PERTURBED, Net, failing, quiet
from tests.support.modules import differing, examples, parameters
from tests.support.seeds import seeded


def test_memory_per_step_is_what_autograd_saves() -> None:
    class Product(Net):
        """g = ½ Σ (θ w)², whose first gradient θ w² and second one save a few vectors of 1000."""

        def __init__(self, size: int) -> None:
            super().__init__(net=nn.Linear(size, 1, bias=False))

        def inner_loss(self, batch: Any) -> Tensor:
            return 0.5 * (self.net.weight * self.weights.sum()).square().sum()

        def outer_loss(self, batch: Any) -> Tensor:
            return self.net.weight.sum()

    small, large = (quiet(Product(size), EPISODE, [ReverseUnroll()]).step_bytes for size in (1000, 2000))
    assert (large - small) % 4000 == 0
    assert 1 <= (large - small) / 4000 <= 8
    text = " ".join(str(quiet(Product(10**5), EPISODE, [ReverseUnroll()])).split())
    assert re.search(
        r"Reverse mode saves at least [\d.]+ (KiB|MiB) per inner step and episode: [\d.]+ MiB in all,", text
    )


def branching(x: Tensor) -> Tensor:
    return 2 * x if x.sum().item() > 0 else 3 * x  # here: branching


def recomputed(x: Tensor) -> Tensor:
    return checkpoint(torch.tanh, x, use_reentrant=False)  # here: recomputed


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (branching, "Python looks at the value of a tensor, which has many values where it is vectorized"),
        (recomputed, "`torch.utils.checkpoint` does not work inside function transforms"),
    ],
    ids=["branching", "recomputed"],
)
def test_cannot_be_vectorized(act: Any, reason: str) -> None:
    report = quiet(Net(act))
    assert all(report[name].works for name in PERTURBED)  # looped
    assert not report.vectorizes
    assert f"cannot be vectorized over episodes, so these are looped: {reason}" in " ".join(str(report).split())
    assert report["ReverseUnroll"].works


def test_batches_with_other_things_than_tensors() -> None:
    report = quiet(Net(), Episode([(*examples(0)[:2], "a name")], examples(1)[:2]))
    assert report.vectorizes is False
    assert "batches have entries that are no tensors" in str(report)
    assert report["PZOBO"].works


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.unsqueeze(-1))[0][:, -1])


def test_an_rnn() -> None:
    report = quiet(Net(net=seeded(Recurrent)))
    assert failing(report) == set()
    assert report.vectorizes is False


def test_batch_norm_is_no_obstacle() -> None:
    module = Net(net=seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))))
    before = parameters(module)
    report = quiet(module)
    assert failing(report) == set()
    assert differing(before, parameters(module)) == []


def test_an_outer_loss_without_a_gradient() -> None:
    class Accuracy(Net):
        def outer_loss(self, batch: Any) -> Tensor:
            return (self.net(batch[0]).round() == batch[1].round()).float().mean()

    report = quiet(Accuracy())
    assert report["ReverseUnroll"].reason == "it runs, but gives zero for `weights`: the outer loss has no gradient"
    assert report["ReverseUnroll"].advice == ""
    assert report.notes[0].startswith("The outer loss has no gradient: it is cut off from the parameters. Look for")

    class Count(Net):
        def outer_loss(self, batch: Any) -> Tensor:
            return (self.net(batch[0]) > batch[1]).sum()

    assert "floating-point numbers, got 'a tensor of torch.int64'" in quiet(Count()).notes[0]
