"""Every example runs: `--smoke` writes its picture and its numbers, `--help` explains, bad input is named."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1]
EXAMPLES = [path.stem for path in sorted(FOLDER.glob("*.py")) if "def main" in path.read_text()]
CLEANING = ["reverse", "checkpointed", "guided", "neumann", "pzobo", "fsla", "two-phase"]


def run(name: str, *argv: str) -> dict:
    return importlib.import_module(name).main(list(argv))


@pytest.mark.filterwarnings("ignore:The first hypergradient is exactly zero")  # of a difference in float32
@pytest.mark.parametrize("name", EXAMPLES)
def test_smoke(name: str, tmp_path: Path) -> None:
    run(name, "--smoke", "--quiet", "--output", str(tmp_path))
    assert list(tmp_path.glob("*.png"))
    assert [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run(name, "--help")
    assert "--output" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_accelerator_is_the_one_that_is_asked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accelerator name: `accelerator='abacus'`"):
        run(name, "--smoke", "--quiet", "--output", str(tmp_path), "--accelerator", "abacus")


@pytest.mark.filterwarnings("ignore:`Neumann")  # after 6 steps the inner Hessian is not positive definite yet
@pytest.mark.parametrize("strategy", CLEANING)
def test_data_cleaning_with(strategy: str, tmp_path: Path) -> None:
    result = run("data_cleaning", "--smoke", "--quiet", "--output", str(tmp_path), "--strategy", strategy, "--compare")
    assert set(result["accuracy"]) == {"noisy", "validation only", "cleaned", "clean only"}
    assert all(0 <= value <= 1 for value in [*result["accuracy"].values(), result["auroc"]])
    assert -1 <= result["cosine"] <= 1 + 1e-6
    assert math.isfinite(result["seconds"])
    assert Path(result["figure"]).stat().st_size > 10_000


def test_data_cleaning_cleans(tmp_path: Path) -> None:
    """A quarter of the default run already tells wrong labels from right ones."""
    result = run("data_cleaning", "--quiet", "--output", str(tmp_path), "--steps", "30")
    assert result["auroc"] > 0.95
    assert result["accuracy"]["cleaned"] > result["accuracy"]["noisy"] + 0.05


def test_data_cleaning_without_its_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        run("data_cleaning", "--smoke", "--quiet", "--output", str(tmp_path), "--data-dir", str(tmp_path / "nothing"))


def test_the_arguments_of_all_strategies() -> None:
    module = importlib.import_module("data_cleaning")
    assert module.without_strategy(["--seed", "1", "--strategy", "all", "--smoke"]) == ["--seed", "1", "--smoke"]
    assert module.without_strategy(["--strategy=all", "--smoke"]) == ["--smoke"]
