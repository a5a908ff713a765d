"""What the benchmark of remedies against overfitting changes about a run, in two outer steps."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cleaning.baselines import Examples, Task

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in (FOLDER / "papers", FOLDER):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("outer_overfitting")


@pytest.fixture
def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 64, generator=generator), torch.arange(60) % 10
    start = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return Task(start, Examples(x[:40], y[:40]), Examples(x[40:], y[40:]), steps=2)


def logits(script: Any, task: Task, remedy: Any, *, inside: bool = False, held_out: bool = False) -> torch.Tensor:
    parts = (task.trusted, task.trusted if inside else None, task.trusted if held_out else None)
    module = script.learned("table", remedy, task, *parts, seed=0, outer_steps=4)
    return module.learned_logits(task.noisy)


def test_each_remedy_changes_what_is_learned(script: Any, task: Task) -> None:
    found = [
        logits(script, task, script.Remedy()),
        logits(script, task, script.Remedy(inside=True), inside=True),
        logits(script, task, script.Remedy(prior=100.0)),
        logits(script, task, script.Remedy(horizon=3)),
        logits(script, task, script.Remedy(averaged=True)),
    ]
    for number, one in enumerate(found):
        assert one.shape == (40,)
        assert all(not torch.allclose(one, other, atol=1e-6) for other in found[number + 1 :])


def test_a_prior_draws_what_is_learned_to_zero(script: Any, task: Task) -> None:
    free, drawn = (logits(script, task, script.Remedy(prior=prior)) for prior in (0.0, 1000.0))
    assert drawn.norm() < free.norm()


def test_early_stopping_takes_the_step_of_the_least_loss(script: Any) -> None:
    watch = script.Watch(None)
    watch.states = [{"logits": torch.full((2,), float(step)), "net.0": torch.tensor(step)} for step in range(4)]
    watch.losses = [3.0, 1.0, 2.0, 4.0]
    assert watch.best()["logits"].tolist() == [1, 1]
    mean = watch.mean()  # of the second half, with the last net
    assert mean["logits"].tolist() == [2.5, 2.5]
    assert mean["net.0"] == 3
