"""The condensation example: its data and net, what counts as a run, what is tested, and that images get better."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import data_condensation as example
import report
from condensation import baselines
from lightning_bilevel import Episode, TruncatedReverse, hypergradient
from lightning_bilevel.directions import Orthogonal

pytestmark = pytest.mark.filterwarnings("ignore:`Neumann")  # after so few steps no Hessian is positive definite


def options(folder: Path, *argv: str) -> Any:
    return example.parse(["--quiet", "--output", str(folder), "--width", "4", "--nets", "2", *argv])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with report.screen():
        yield


@pytest.fixture(scope="module")
def digits() -> example.Data:
    return example.load(None, None, seed=0)


def module_and_episode(data: example.Data, inner_steps: int = 3) -> tuple[example.Condensation, Episode]:
    """Return a small problem in float64."""
    torch.manual_seed(0)
    module = example.Condensation(example.real_images(data, 1, seed=0), 2, inner_steps, inner_lr=0.1, outer_lr=0.1)
    labels = example.labels_of(1)
    return module.double(), Episode([(torch.arange(10), labels)], (data.train_x[:50].double(), data.train_y[:50]))


def test_images_are_standardized_and_averaged_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(30, 28, 28, generator=generator)
    y = torch.arange(30) % 10
    monkeypatch.setattr(example, "load_mnist", lambda folder: example.Data(x[:20], y[:20], x[20:], y[20:]))
    data = example.load(tmp_path, 14, seed=0)
    assert data.train_x.shape == (20, 1, 14, 14)
    assert data.side == 14
    assert data.train_x.mean().item() == pytest.approx(0, abs=1e-5)
    assert data.train_x.std().item() == pytest.approx(1, rel=1e-5)
    # Test images go through what was fixed by the training images, not by themselves.
    block = x[:, 4:6, 6:8].mean((1, 2))
    shown = torch.cat([data.train_x, data.test_x])[:, 0, 2, 3]
    slope = (shown[1] - shown[0]) / (block[1] - block[0])
    assert torch.allclose(shown, shown[0] + slope * (block - block[0]), atol=1e-4)


@pytest.mark.parametrize("side", [8, 14, 16, 28])
def test_the_last_normalization_sees_sixteen_pixels(side: int) -> None:
    net = example.convnet(side, 4)
    seen: list[int] = []
    for layer in net:
        if isinstance(layer, nn.GroupNorm):
            layer.register_forward_hook(lambda layer, inputs, output: seen.append(output[0, 0].numel()))
    assert net(torch.zeros(2, 1, side, side)).shape == (2, 10)
    assert len(seen) == 3
    assert seen[-1] >= 16
    assert sum(isinstance(layer, nn.AvgPool2d) for layer in net) == (3 if side >= 16 else 2)


def test_real_images_are_in_the_order_of_their_labels(digits: example.Data) -> None:
    images, labels = example.real_images(digits, 3, seed=0), example.labels_of(3)
    assert images.shape == (30, 1, 8, 8)
    for image, label in zip(images, labels, strict=True):
        same = (digits.train_x == image).flatten(1).all(1)
        assert (digits.train_y[same] == label).any()
    assert not torch.equal(images, example.real_images(digits, 3, seed=1))
    assert len(images.flatten(1).unique(dim=0)) == 30


@pytest.mark.parametrize("name", ["checkpointed", "truncated"])
def test_what_is_exact_is_the_same(name: str, digits: example.Data) -> None:
    """Three steps are fewer than the ten of the truncation."""
    module, episode = module_and_episode(digits)
    exact, other = (
        hypergradient(module, example.STRATEGIES[each](0.1, 1), episode).grads["images"] for each in ("reverse", name)
    )
    assert exact.abs().max() > 1e-3
    assert torch.allclose(exact, other, atol=1e-12)


def test_forward_directions_add_up_to_the_exact_gradient() -> None:
    """All 160 directions of a basis instead of 32 random ones."""
    module, episode = module_and_episode(example.load(None, 4, seed=0), inner_steps=2)
    strategy = example.STRATEGIES["forward"](0.1, 1)
    assert strategy.num_directions == 32
    strategy.num_directions, strategy.directions = 160, Orthogonal()
    exact = hypergradient(module, example.STRATEGIES["reverse"](0.1, 1), episode).grads["images"]
    assert torch.allclose(hypergradient(module, strategy, episode).grads["images"], exact, atol=1e-10)


def test_truncation_is_not_the_exact_gradient(digits: example.Data) -> None:
    module, episode = module_and_episode(digits, inner_steps=30)
    exact, cut = (
        hypergradient(module, strategy, episode).grads["images"].flatten()
        for strategy in (example.STRATEGIES["reverse"](0.1, 1), TruncatedReverse(10))
    )
    assert torch.cosine_similarity(exact, cut, dim=0) < 0.95


def test_a_run_ends_with_its_seconds(tmp_path: Path, digits: example.Data) -> None:
    run = example.condense(digits, "truncated", options(tmp_path, "--seconds", "0", "--inner-steps", "2"))
    assert (run["outer steps"], len(run["images"]), len(run["losses"]), len(run["seconds"])) == (1, 1, 1, 1)


def test_a_run_ends_with_its_steps_and_keeps_every_one(tmp_path: Path, digits: example.Data) -> None:
    argv = ["--seconds", "0", "--least-steps", "3", "--inner-steps", "2"]
    run = example.condense(digits, "truncated", options(tmp_path, *argv))
    assert (run["outer steps"], len(run["losses"]), len(run["images"])) == (1, 1, 3)
    run = example.condense(digits, "truncated", options(tmp_path, "--steps", "3", "--inner-steps", "2"))
    assert run["outer steps"] == len(run["images"]) == 3
    assert run["seconds"] == sorted(run["seconds"])
    steps = [run["start"], *run["images"]]
    assert all(not torch.equal(before, after) for before, after in zip(steps[:-1], steps[1:], strict=True))
    # Adam's first step is as long as its learning rate.
    assert (steps[1] - steps[0]).abs().max().item() == pytest.approx(0.05, rel=1e-2)


def test_every_step_has_a_net_of_its_own(tmp_path: Path, digits: example.Data) -> None:
    """With images that stay where they are, the outer loss changes by net and batch only."""
    args = options(tmp_path, "--steps", "3", "--inner-steps", "2", "--outer-lr", "0", "--outer-batch", "1300")
    losses = example.condense(digits, "reverse", args)["losses"]
    assert len({round(loss, 4) for loss in losses}) == 3
    assert losses == example.condense(digits, "reverse", args)["losses"]


def test_batches_of_the_condensed_set(tmp_path: Path, digits: example.Data) -> None:
    args = options(tmp_path, "--steps", "2", "--inner-steps", "3", "--per-class", "2", "--inner-batch", "8")
    run = example.condense(digits, "reverse", args)
    moved = (run["images"][-1] != run["start"]).flatten(1).any(1)
    assert moved.sum() == 20  # three batches of 8 of the 20 in every outer step


def test_the_first_phase_takes_half_of_what_truncated_took(tmp_path: Path, digits: example.Data) -> None:
    argv = ["--smoke", "--steps", "3", "--strategy", "truncated", "two-phase"]
    args = options(tmp_path, *argv)
    runs = example.compare(digits, args)
    assert args.phase_steps == 1
    assert torch.equal(runs[0]["images"][0], runs[1]["images"][0])
    assert not torch.equal(runs[0]["images"][1], runs[1]["images"][1])
    assert [run["common steps"] for run in runs] == [3, 3]


def test_training_and_testing_leave_the_global_generator_alone(tmp_path: Path, digits: example.Data) -> None:
    args = options(tmp_path, "--smoke")
    before = torch.get_rng_state()
    accuracies = example.test(digits, example.real_images(digits, 1, seed=0), args)
    assert torch.equal(before, torch.get_rng_state())
    assert len(set(accuracies)) == 2  # two nets
    assert accuracies == example.test(digits, example.real_images(digits, 1, seed=0), args)


def test_a_net_learns_the_whole_set(digits: example.Data) -> None:
    net = example.new_net(digits, 8, seed=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    example.train(net, optimizer, digits.train_x, digits.train_y, steps=80, batch=128, seed=0)
    assert example.accuracy(net, digits) > 0.85


def test_condensed_images_train_better_than_real_ones(tmp_path: Path, digits: example.Data) -> None:
    argv = ["--steps", "12", "--inner-steps", "25", "--inner-lr", "0.2", "--test-steps", "25", "--nets", "3"]
    args = options(tmp_path, *argv, "--width", "16", "--seconds", "600")
    run = example.condense(digits, "reverse", args)
    real, condensed = (example.test(digits, images, args) for images in (run["start"], run["images"][-1]))
    assert example.mean(condensed) > example.mean(real) + 0.05


@pytest.mark.parametrize(
    ("names", "per_class", "rows"), [(["reverse"], 1, 4), (["reverse"], 20, 10), (["a", "b"], 1, 3)]
)
def test_rows_of_the_picture(names: list[str], per_class: int, rows: int) -> None:
    images = [torch.zeros(10 * per_class, 1, 8, 8)] * 40
    runs = [
        {"strategy": name, "start": images[0], "images": images, "outer steps": 40, "accuracy": [0.5, 0.7]}
        for name in names
    ]
    found = example.rows_of(runs, [0.25])
    assert len(found) == rows
    assert {row.images.shape for row in found} == {(10, 1, 8, 8)}
    if per_class == 1:
        assert found[0].note == "25.0"
        assert found[-1].note == f"60.0 ± {100 * math.sqrt(0.02):.1f}"


@pytest.mark.parametrize("argv", [["--strategy", "all"], ["--per-class", "2"]])
def test_all_of_it_in_small(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = example.main(["--smoke", "--steps", "2", "--quiet", "--output", str(tmp_path), *argv])
    names = [run["strategy"] for run in results["runs"]]
    assert names == ([name for name in example.STRATEGIES if name != "checkpointed"] if "all" in argv else ["reverse"])
    assert set(results["baselines"]) == {"start", "real images", *baselines.CHOSEN, "whole training set"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*names, "real images", "whole training set"])
    assert list(tmp_path.glob("condensation_digits_*.png"))
    assert list(tmp_path.glob("condensation_digits_*.json"))
