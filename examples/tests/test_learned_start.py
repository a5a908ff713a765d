"""The learned start: what it is compared with is computed right, and it wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import learned_start as example
from learned_start import LearnedStart, Rule


@pytest.fixture
def module() -> LearnedStart:
    torch.manual_seed(0)
    return LearnedStart(side=4, width=5, frequencies=3)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("optimizer", example.RATES)
@pytest.mark.parametrize("decay", [False, True])
def test_copies_are_trained_as_one_by_one(module: LearnedStart, images: Tensor, optimizer: str, decay: bool) -> None:
    rule, start = Rule(optimizer, 0.05, decay), {k: v.clone() for k, v in module.net.state_dict().items()}
    found = example.trained(module, images, rule, 3)
    assert found.shape == (4, 3, 16)
    for image, stages in zip(images, found.unbind(1), strict=True):
        module.net.load_state_dict(start)
        by_hand = rule.make(module.net.parameters())
        for step, stage in enumerate(stages):
            torch.testing.assert_close(module.net(module.pixels).flatten(), stage, rtol=1e-4, atol=1e-5)
            by_hand.param_groups[0]["lr"] = 0.05 * (1 - step / 3 if decay else 1)
            by_hand.zero_grad()
            module.inner_loss(image).backward()
            by_hand.step()


def test_the_learned_rate_is_that_of_gradient_descent(module: LearnedStart, images: Tensor) -> None:
    expected = example.trained(module, images, Rule("SGD", module.log_lr.exp().item(), False), 3)
    torch.testing.assert_close(module.drawn(images, [0, 1, 3]), expected[[0, 1, 3]], rtol=1e-4, atol=1e-5)


def test_the_last_layer_is_solved_for(module: LearnedStart, images: Tensor) -> None:
    with torch.no_grad():
        features = torch.cat([module.net[:-1](module.pixels), torch.ones(16, 1)], 1).double()
        weights = torch.linalg.lstsq(features, images.T.double(), driver="gelsd").solution
    torch.testing.assert_close(example.solved(module, images, 1e-7), (features @ weights).T.float(), rtol=0, atol=1e-3)


def test_a_rule_that_diverges_is_not_chosen(
    module: LearnedStart, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = [Rule("SGD", 1e30, False), Rule("SGD", 0.01, False), Rule("SGD", 0.1, False)]
    monkeypatch.setattr(example, "rules", lambda: tried)
    assert {choice.rule for choice in example.best([module], images).values()} == {tried[2]}


def test_a_start_learned_for_seconds_is_ahead_at_three_steps(tmp_path: Path) -> None:
    found = example.main(["--steps", "200", "--quiet", "--output", str(tmp_path)])
    for name in (example.PRETRAINED, example.PLAIN, example.LAST, example.MEAN):
        mean, half = found["ahead by"][name][3]
        assert mean > half, name
    assert (tmp_path / "learned_start.png").stat().st_size > 5_000


@pytest.mark.parametrize("strategy", example.STRATEGIES)
def test_it_runs_with(strategy: str, tmp_path: Path) -> None:
    found = example.main(["--smoke", "--quiet", "--strategy", strategy, "--output", str(tmp_path)])
    assert found["strategy"] == strategy
    assert (tmp_path / "learned_start.json").is_file()
