"""The benchmark of seven hyperparameters: what is differentiated is the training that the searches run."""

from __future__ import annotations

import copy
import importlib
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bilevel import Episode, ForwardUnroll, ReverseUnroll, hypergradient

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in (FOLDER / "papers", FOLDER):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("few_hyperparameters")


def test_the_inner_run_is_the_training_of_the_searches(script: Any) -> None:
    data = script.digits(0)
    module = script.Tuned(4, "reset", 0.1)
    steps = list(islice(script.batches(data, torch.Generator().manual_seed(0)), 4))
    net, at = copy.deepcopy(module.net), script.named(script.start())
    optimizer = torch.optim.Adam(net.parameters(), lr=script.DEFAULT["lr"])
    for batch in steps:
        optimizer.zero_grad()
        script.training_loss(net, batch, at).backward()
        optimizer.step()
    with torch.no_grad(), module.adapted(steps):
        for ours, plain in zip(module.net.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_every_hyperparameter_has_a_hypergradient(script: Any) -> None:
    module = script.Tuned(3, "reset", 0.1)
    with torch.no_grad():
        module.point.fill_(0.7)
    data = script.digits(0)
    steps = list(islice(script.batches(data, torch.Generator().manual_seed(0)), 3))
    reverse, forward = (
        hypergradient(module, strategy, Episode(steps, data.validation)).grads["point"]
        for strategy in (ReverseUnroll(), ForwardUnroll())
    )
    torch.testing.assert_close(reverse, forward, rtol=1e-3, atol=1e-5)
    assert (reverse != 0).all()


def test_a_point_is_the_hyperparameters_it_was_made_from(script: Any) -> None:
    assert {name: value.item() for name, value in script.named(script.start()).items()} == {
        name: pytest.approx(value, rel=1e-4) for name, value in script.DEFAULT.items()
    }


def test_images_to_train_validate_and_test_on_are_others(script: Any) -> None:
    data = script.digits(0)
    assert [len(y) for _, y in data] == [200, 200, 1397]
