"""The baselines of data cleaning do what they say: each on a problem where one knows what must come out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleaning import baselines
from cleaning.baselines import BASELINES, Examples, Task


def blobs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return points around three corners of a triangle, and the corners."""
    y = torch.arange(count) % 3
    centres = 3 * torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]])
    return centres[y] + 0.5 * torch.randn(count, 2, generator=generator), y


class Case:
    """Three blobs; 30% of the 150 noisy labels are another class; 9 trusted examples."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x, y = blobs(150, generator)
        self.is_wrong = torch.randperm(len(y), generator=generator) < 45
        other = (y + torch.randint(1, 3, y.shape, generator=generator)) % 3
        noisy = Examples(x, torch.where(self.is_wrong, other, y))
        self.task = Task(nn.Linear(2, 3), noisy, Examples(*blobs(9, generator)), steps=60, lr=0.3)
        self.test = Examples(*blobs(300, generator))


@pytest.fixture
def case() -> Case:
    return Case()


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_trains_and_leaves_the_start_alone(name: str, case: Case) -> None:
    before = copy.deepcopy(case.task.start.state_dict())
    net = BASELINES[name](case.task)
    assert baselines.accuracy(net, case.test) > 0.9  # the majority of the labels is right here
    assert all(torch.equal(value, before[key]) for key, value in case.task.start.state_dict().items())


def test_descent_is_gradient_descent(case: Case) -> None:
    (net,) = baselines.descent(case.task.start, baselines.cross_entropy(case.task.noisy), steps=1, lr=0.5)
    loss = F.cross_entropy(case.task.start(case.task.noisy.x), case.task.noisy.y)
    for new, old, grad in zip(
        net.parameters(),
        case.task.start.parameters(),
        torch.autograd.grad(loss, list(case.task.start.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(new, old - 0.5 * grad)


def test_a_weight_of_zero_is_an_example_left_out(case: Case) -> None:
    right = ~case.is_wrong
    left_out = baselines.train(case.task, case.task.noisy.take(right))
    weighted = baselines.train(case.task, case.task.noisy.weighted(right.float()))
    torch.testing.assert_close(weighted.weight, left_out.weight)


def test_examples_together(case: Case) -> None:
    both = case.task.noisy + case.task.trusted.weighted(3.0)
    assert both.weights.tolist() == [1.0] * 150 + [3.0] * 9
    assert torch.equal(both.y, torch.cat([case.task.noisy.y, case.task.trusted.y]))


def test_the_net_is_stopped_where_the_trusted_examples_are_classified_best(case: Case) -> None:
    net = baselines.stopped_early(case.task)
    nets = baselines.descent(
        case.task.start, baselines.cross_entropy(case.task.noisy), case.task.steps, case.task.lr, baselines.MARKS
    )
    found = [baselines.accuracy(each, case.task.trusted) for each in nets]
    assert len(found) == len(baselines.MARKS)
    assert baselines.accuracy(net, case.task.trusted) == max(found)


def test_folds_hold_every_example_out_once(case: Case) -> None:
    parts = list(baselines.folds(case.task.trusted, 4))
    assert len(parts) == 4
    assert all(len(fit.y) + len(held_out.y) == 9 for fit, held_out in parts)
    held_out = torch.cat([held_out.x for _, held_out in parts])
    assert torch.equal(held_out.sort(0).values, case.task.trusted.x.sort(0).values)


def test_the_filter_keeps_what_a_net_agrees_with(case: Case) -> None:
    """A net that is always right keeps the right labels and no other."""
    net = baselines.train(case.task, Examples(*blobs(300, torch.Generator().manual_seed(1))))
    kept = baselines.agrees(net, case.task.noisy)
    assert (kept == ~case.is_wrong).float().mean() > 0.98
    assert torch.equal(kept, net(case.task.noisy.x).argmax(-1) == case.task.noisy.y)


def test_rounds_ask_the_net_of_the_round_before(case: Case) -> None:
    first = baselines.agreement(case.task, rounds=1)
    kept = case.task.noisy.take(baselines.agrees(first, case.task.noisy))
    second = baselines.train(case.task, kept + case.task.trusted)
    torch.testing.assert_close(baselines.agreement(case.task, rounds=2).weight, second.weight)


def test_the_smallest_losses(case: Case) -> None:
    net = case.task.start
    losses = F.cross_entropy(net(case.task.noisy.x), case.task.noisy.y, reduction="none")
    kept = baselines.smallest(net, case.task.noisy, 0.3)
    assert len(kept) == 45
    assert losses[kept].max() <= losses.sort().values[44]


def test_fine_tuning_starts_from_the_trained_net(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is gained, nothing is changed; else the steps are counted from there, on trusted examples only."""
    perfect = baselines.train(case.task, case.test)
    assert baselines.fine_tuned(case.task, perfect) is perfect

    starts = []
    descent = baselines.descent
    monkeypatch.setattr(
        baselines, "descent", lambda start, *rest, **more: starts.append(start) or descent(start, *rest, **more)
    )
    wrong = baselines.train(case.task, case.test._replace(y=(case.test.y + 1) % 3))
    starts.clear()
    tuned = baselines.fine_tuned(case.task, wrong)
    assert len(starts) == baselines.FOLDS * len(baselines.RATES) + 1
    assert all(start is wrong for start in starts)
    assert baselines.accuracy(tuned, case.test) > 0.9 > 0.1 > baselines.accuracy(wrong, case.test)


def test_the_correction_is_that_of_the_labels(case: Case) -> None:
    """Even where most labels are wrong: 80% are the next class."""
    most = torch.arange(150) % 5 > 0
    noisy = case.task.noisy._replace(y=torch.where(most, (torch.arange(150) + 1) % 3, torch.arange(150) % 3))
    task = case.task._replace(noisy=noisy)
    assert baselines.accuracy(baselines.train(task, noisy), case.test) < 0.1
    assert baselines.accuracy(baselines.loss_correction(task), case.test) > 0.9
