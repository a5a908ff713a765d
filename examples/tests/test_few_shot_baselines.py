"""Baselines of few-shot learning, on tasks whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from few_shot import baselines
from few_shot.nets import cnn
from lightning_bilevel import Episode


def test_a_fitted_kernel_is_the_one_that_drew_the_functions() -> None:
    """Functions of a known amplitude and length; the support set of an unseen one tells the rest of it."""
    generator = torch.Generator().manual_seed(0)

    def task() -> Episode:
        x = 10 * torch.rand(30, 1, generator=generator, dtype=torch.float64) - 5
        covariance = 4 * torch.exp(-torch.cdist(x, x).square() / (2 * 1.5**2)) + 1e-8 * torch.eye(30)
        y = torch.linalg.cholesky(covariance) @ torch.randn(30, 1, generator=generator, dtype=torch.float64)
        return Episode([(x[:20], y[:20])], (x[20:], y[20:]))

    tasks = [task() for _ in range(30)]
    kernel = baselines.fitted(tasks[:20])
    assert kernel.k2.length_scale == pytest.approx(1.5, rel=0.1)
    assert kernel.k1.constant_value == pytest.approx(4, rel=0.4)
    errors = [baselines.squared_error(kernel, each) for each in tasks[20:]]
    assert sum(errors) < 0.2 * sum(each.outer[1].square().mean().item() for each in tasks[20:])


@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize("head", baselines.HEADS)
def test_a_head_tells_what_features_separate(head: str, shots: int) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(3, 6)
    x = directions.repeat(shots, 1) + 0.05 * torch.randn(3 * shots, 6, generator=generator)
    y = torch.arange(3).repeat(shots)
    task = Episode([(x, y)], (5 * directions, torch.arange(3)))  # only the direction of features counts
    assert baselines.accuracy(nn.Identity(), head, task) == 1
    wrong = task._replace(outer=(5 * directions, torch.tensor([1, 2, 0])))
    assert baselines.accuracy(nn.Identity(), head, wrong) == 0


def test_scores_are_those_of_what_suits_the_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 1, generator=generator)
    numbers = Episode([(x[:6], x[:6].sin())], (x[6:], x[6:].sin()))
    x = torch.rand(12, 2, generator=generator)
    classes = Episode([(x[:6], torch.arange(6) % 2)], (x[6:], torch.arange(6) % 2))
    expected = baselines.squared_error(baselines.fitted([numbers]), numbers)
    assert baselines.scores([numbers] * 2, [numbers]) == {"Gaussian process": [expected] * 2}
    found = baselines.scores([classes], [classes])
    assert found == {f"pixels, {head}": [baselines.accuracy(nn.Identity(), head, classes)] for head in baselines.HEADS}


def test_a_classifier_learns_and_returns_its_body() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(40) % 2
    x = torch.randn(40, 1, 8, 8, generator=generator) + 2 * y.view(-1, 1, 1, 1)
    torch.manual_seed(0)
    net = cnn(2, channels=4, blocks=2)
    before = [each.clone() for each in net.body.parameters()]
    body = baselines.classifier(net, x, y, seconds=0.5, seed=0)
    assert body is net.body
    assert any(not torch.equal(a, b) for a, b in zip(before, body.parameters(), strict=True))
    assert (net(x).argmax(1) == y).float().mean() > 0.9
