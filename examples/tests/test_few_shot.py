"""`maml.py` and `anil.py`: every strategy and every kind of data runs, and both learn."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import anil
import maml
from few_shot.cifar100 import load_cifar100
from few_shot.learners import FewShotClassifier, MeanWithInterval
from few_shot.nets import cnn, resnet12
from few_shot.omniglot import load_omniglot
from few_shot.run import STRATEGIES
from few_shot.sinusoid import Sinusoids
from lightning_bilevel import Episode, ReverseUnroll, hypergradient

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")


def run(example: Any, folder: Path, *argv: str) -> dict[str, Any]:
    options = ("--smoke", "--quiet", "--test-tasks", "2", "--test-steps", "0", "2", "--output", str(folder))
    return example.main([*options, *argv])


@pytest.mark.filterwarnings("ignore:`ConjugateGradient")  # an untrained net's inner Hessian is not positive definite
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("example", "data"), [(maml, "sinusoid"), (maml, "digits"), (anil, "digits")])
def test_every_strategy(example: Any, data: str, strategy: str, tmp_path: Path) -> None:
    result = run(example, tmp_path, "--data", data, "--strategy", strategy)
    assert (result["proximal"] > 0) == (strategy == "implicit")
    assert np.isfinite(result["curve"]["mean"]).all()
    assert len(result["curve"]["mean"]) == 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Omniglot and a small CIFAR-100 in the layout of the real ones."""
    folder, random = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    (folder / "omniglot").mkdir()
    for part, characters in (("background", 3), ("evaluation", 6)):
        np.savez(folder / "omniglot" / f"images_{part}.npz", images=random.random((characters, 20, 105, 105)) > 0.1)
    (folder / "cifar-100-python").mkdir()
    for part, each in (("train", 15), ("test", 5)):
        pixels = random.integers(0, 256, (100 * each, 3072), dtype=np.uint8)
        content = {b"data": pixels, b"fine_labels": sorted([*range(100)] * each)}
        (folder / "cifar-100-python" / part).write_bytes(pickle.dumps(content))
    return folder


def test_omniglot(files: Path, tmp_path: Path) -> None:
    x, y = load_omniglot(files, "train")
    assert x.shape == (60, 1, 28, 28)
    assert y.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert 0 <= x.min() < x.mean() < 0.2 < x.max() <= 1  # ink is 1, and a tenth of the pixels
    assert len(load_omniglot(files / "omniglot", "test", size=14)[0]) == 120
    result = run(maml, tmp_path, "--data", "omniglot", "--data-dir", str(files), "--channels", "4")
    assert result["ways"] == 5  # of 3 characters and their quarter turns


def test_cifar100(files: Path, tmp_path: Path) -> None:
    x, y = load_cifar100(files)
    assert x.shape == (2000, 3, 32, 32)
    assert y.bincount().tolist() == [20] * 100
    assert (x[1500:, 0].mean() - 0.5).abs() < 0.01
    run(anil, tmp_path, "--data", "cifar100", "--data-dir", str(files), "--channels", "4", "--shots", "5")


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"images_background\.npz"):
        run(maml, tmp_path, "--data", "omniglot", "--data-dir", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="to have the files train and test"):
        run(maml, tmp_path, "--data", "cifar100", "--data-dir", str(tmp_path))
    with pytest.raises(SystemExit, match="needs `--data-dir`"):
        run(maml, tmp_path, "--data", "omniglot")
    with pytest.raises(SystemExit, match="^Expected `--data` to be one of sinusoid, digits,"):
        run(maml, tmp_path, "--data", "mnist")
    for content, message in (
        ({b"data": 1}, "b'fine_labels'"),
        ({b"data": np.zeros(3), b"fine_labels": [0]}, "bytes, got"),
    ):
        for part in ("train", "test"):
            (tmp_path / part).write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=message):
            load_cifar100(tmp_path)


def test_anil_learns(tmp_path: Path) -> None:
    """Chance is 20% on held-out digits."""
    common = ("--quiet", "--steps", "40", "--test-tasks", "30", "--test-steps", "0", "1", "--output", str(tmp_path))
    result = anil.main([*common, "--shots", "5", "--tasks", "8"])
    before, after = result["curve"]["mean"]
    assert before < 0.35
    assert after > 0.6
    assert result["during the run"][0] == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]
    assert {name for name, row in result["without"].items() if row["mean"] > after} >= {"pixels, nearest neighbour"}


def test_maml_learns_sinusoids(tmp_path: Path) -> None:
    """One step of a trained start does more than ten of an untrained one."""
    common = ("--quiet", "--test-tasks", "30", "--test-steps", "1", "10", "--output", str(tmp_path))
    untrained = maml.main([*common, "--steps", "1"])["curve"]["mean"]
    result = maml.main([*common, "--steps", "250", "--outer-lr", "0.01"])
    trained = result["curve"]["mean"]
    assert trained[0] < 0.9 * untrained[1]
    assert trained[1] < 0.7 * untrained[1]
    assert result["without"]["Gaussian process"]["mean"] < trained[1]


def test_a_run_resumes(tmp_path: Path) -> None:
    """The checkpoint that a run leaves behind goes on to the same result."""
    argv = ("--data", "digits", "--validate-every", "3")  # of 4 steps
    whole = run(maml, tmp_path, *argv)
    rest = run(maml, tmp_path, *argv, "--resume", str(tmp_path / "maml_digits.ckpt"))
    assert whole["curve"] == rest["curve"]
    finished = run(maml, tmp_path, *argv, "--steps", "3", "--resume", str(tmp_path / "maml_digits.ckpt"))
    assert finished["during the run"] is None


def test_learned_rates_have_gradients() -> None:
    torch.manual_seed(0)
    module = FewShotClassifier(cnn(2, channels=3, blocks=2), inner="head", inner_lr=0.3, learn_rates=True)
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 2
    grads = hypergradient(module, ReverseUnroll(), Episode([(x, y)], (x, y))).grads
    rates = {name: grad for name, grad in grads.items() if name.startswith("rates")}
    assert [tuple(grad.shape) for grad in rates.values()] == [(2, 3), (2,)]
    assert all(grad.abs().sum() > 0 for grad in rates.values())
    # The step is θ − rate · g, so the derivative by the rates is −g · ∂f/∂θ: down where the step helps.
    assert sum(grad.sum() for grad in rates.values()) < 0


def test_resnet12_has_twelve_layers() -> None:
    net = resnet12(5, in_channels=3, widths=(4, 4, 8, 8))
    kernels = [layer.kernel_size for layer in net.body.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert kernels.count((3, 3)) == 12
    assert net(torch.rand(2, 3, 28, 28)).shape == (2, 5)


def test_interval_over_tasks() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    metric = MeanWithInterval()
    for part in values.split(20):
        metric.update(part)
    mean, half = metric.compute()
    torch.testing.assert_close(mean, values.double().mean(), rtol=1e-6, atol=0, check_dtype=False)
    torch.testing.assert_close(half, 1.96 * values.double().std() / 50**0.5, rtol=1e-6, atol=0, check_dtype=False)


def test_sinusoids() -> None:
    tasks = Sinusoids(shots=3, queries=500, num_tasks=100)
    amplitudes = []
    for task in tasks:
        (x, y), (query, truth) = task.inner[0], task.outer
        assert x.shape == y.shape == (3, 1)
        assert query.abs().max() <= 5
        # a sin(x − p) = α sin x + β cos x: two coefficients fit all points
        waves = torch.cat([query.sin(), query.cos()], 1)
        solution = torch.linalg.lstsq(waves, truth).solution
        torch.testing.assert_close(waves @ solution, truth, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.cat([x.sin(), x.cos()], 1) @ solution, y, rtol=0, atol=1e-4)
        assert solution[1] <= 1e-4  # −a sin p with p in [0, π]
        amplitudes.append(solution.norm().item())
    assert 0.1 <= min(amplitudes) < 0.6
    assert 4.4 < max(amplitudes) <= 5
