"""Images that are chosen or averaged, where one knows which they must be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import data_condensation as example
from condensation import baselines


@pytest.fixture
def labelled() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(60, 1, 4, 4, generator=generator), torch.arange(60) % 3


def test_one_centre_is_the_mean_of_its_class(labelled: tuple[Tensor, Tensor]) -> None:
    x, y = labelled
    means = torch.stack([x[y == label].mean(0) for label in range(3)])
    assert torch.allclose(baselines.centres(x, y, 1), means, atol=1e-6)


@pytest.mark.parametrize("name", baselines.CHOSEN)
def test_images_of_each_class_come_in_rounds(name: str) -> None:
    """Classes lie far apart, so that every image tells which it is of."""
    y = torch.arange(30) % 3
    x = 10.0 * y.view(-1, 1, 1, 1) + torch.rand(30, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    found = baselines.CHOSEN[name](x, y, 4)
    assert found.shape == (12, 1, 2, 2)
    assert (found.mean((1, 2, 3)) / 10).floor().tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize("choose", [baselines.nearest, baselines.herded])
def test_real_images_are_real_and_no_two_are_the_same(choose, labelled: tuple[Tensor, Tensor]) -> None:
    x, y = labelled
    found = choose(x, y, 3)
    same = (found.flatten(1)[:, None] == x.flatten(1)).all(-1)
    assert (same.sum(1) == 1).all()
    assert len(set(same.int().argmax(1).tolist())) == len(found)


def test_herding_is_near_the_mean_sooner_than_images_drawn_by_chance(labelled: tuple[Tensor, Tensor]) -> None:
    x, y = labelled
    herd = baselines.herded(x, y, 5).view(5, 3, -1).mean(0)
    drawn = torch.stack([x[y == label][:5].flatten(1).mean(0) for label in range(3)])
    means = torch.stack([x[y == label].flatten(1).mean(0) for label in range(3)])
    assert (herd - means).norm() < 0.6 * (drawn - means).norm()


def test_a_run_from_centres_starts_there(tmp_path: Path) -> None:
    options = ["--smoke", "--quiet", "--start", "centres", "--output", str(tmp_path)]
    args = example.parse(options)
    data = example.load(None, None, args.seed)
    run = example.condense(data, "reverse", args)
    assert torch.equal(run["start"], baselines.centres(data.train_x, data.train_y, 1))
    assert not torch.equal(run["images"][0], run["start"])
