"""What one level leads to, where one knows the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyper_representation as example
from representation import baselines


def test_ridge_finds_a_line_and_its_noise() -> None:
    """Half of the mean squared error is half of the variance of the noise, with an intercept."""
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(5, generator=generator)

    def pair(count: int) -> baselines.Pair:
        x = torch.randn(count, 5, generator=generator)
        return x, x @ slope + 3 + 0.2 * torch.randn(count, generator=generator)

    found = baselines.ridge(pair(300), pair(300), pair(3000))
    assert found["test_loss"] == pytest.approx(0.02, rel=0.1)
    assert found["outer_loss"] == pytest.approx(0.02, rel=0.3)


def test_a_penalty_is_chosen_by_the_outer_examples() -> None:
    """With as many inputs as inner examples, no penalty is far worse."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 30, generator=generator)
    y = x[:, 0] + torch.randn(90, generator=generator)
    parts = [(x[part], y[part]) for part in (slice(30), slice(30, 60), slice(60, None))]
    assert baselines.ridge(*parts)["outer_loss"] < 0.5 * F.mse_loss(
        parts[1][0] @ torch.linalg.lstsq(*parts[0]).solution, parts[1][1]
    )


def test_body_and_head_learn_together() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    steps = baselines.jointly(net, net.parameters(), F.cross_entropy, (x, y), 60, seconds=0.5, seed=0)
    assert steps > 10
    assert F.cross_entropy(net(x), y) < 0.6


@pytest.mark.parametrize(("problem", "strategy"), [("linear", "ridge"), ("lenet", "jointly")])
def test_a_row_beside_the_strategies(problem: str, strategy: str, tmp_path: Path) -> None:
    args = example.arguments(["--problem", problem, "--smoke", "--quiet", "--output", str(tmp_path)])
    row = example.without(problem, 0.05, args)
    assert row["strategy"] == strategy
    assert row["outer_loss"] > 0
    assert row.get("test_loss", row.get("test_accuracy")) > 0
