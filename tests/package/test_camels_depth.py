"""The benchmark of CaMeLS's memory: at any size, with what fails as a result, and without what would not fit."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bilevel.strategies.rounding import CoarsestDtype


@pytest.fixture
def camels_depth(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "papers")
    return importlib.import_module("camels_depth")


@pytest.mark.parametrize("precision", ["32", "bf16", "bf16-true"])
@pytest.mark.parametrize("name", ["reverse", "checkpointed", "forward"])
def test_the_benchmark_of_memory_at_any_size(camels_depth: Any, name: str, precision: str) -> None:
    """A tiny model stands for gpt2-xl: all of its options but the device."""
    options = ["--size", "tiny", "--weight-size", "tiny", "--device", "cpu", "--precision", precision, "--chunk", "1"]
    with CoarsestDtype() as seen:
        found = camels_depth.main([*options, "--tokens", "12", "--directions", "2", "--measure", name, "3"])
    assert seen.dtype == (torch.float32 if precision == "32" else torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    assert found["parameters"] > 0
    assert found["LM MiB"] == found["parameters"] * (2 if precision == "bf16-true" else 4) / 2**20
    assert math.isfinite(found["outer loss"])


@pytest.mark.slow
def test_a_case_that_fails_is_a_result(camels_depth: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each case is a process of its own; of one that runs out of memory, the row says why."""
    monkeypatch.setattr(camels_depth, "CASES", [("reverse", 1), ("reverse", 2)])
    results = importlib.import_module("support.results")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    whole = subprocess.run

    def second_fails(command: list[str], **options: Any) -> Any:
        if command[-1] == "2":
            command = [sys.executable, "-c", "raise MemoryError('CUDA out of memory')"]
        return whole(command, **options)

    monkeypatch.setattr(camels_depth.subprocess, "run", second_fails)
    first, second = camels_depth.main(["--size", "tiny"])["rows"]
    assert first["depth"] == 1
    assert first["peak MiB"] >= 0
    assert second == {"strategy": "reverse", "depth": 2, "error": "MemoryError: CUDA out of memory"}
    written = json.loads((tmp_path / "camels_depth_tiny_32.json").read_text())
    assert written["results"] == [first, second]
    assert (tmp_path / "camels_depth_tiny_32.png").exists()


@pytest.fixture
def asked_for(camels_depth: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Let no case run: each takes 10 MiB and 50 a document. Return the cases that were asked for."""
    cases: list[Any] = []

    def run(command: list[str], **options: Any) -> Any:
        cases.append((command[-2], int(command[-1])))
        found = {"peak MiB": 10.0 + 50 * cases[-1][1], "seconds": 1.0, "parameters": 1}
        return subprocess.CompletedProcess(command, 0, json.dumps(found), "")

    monkeypatch.setattr(camels_depth.subprocess, "run", run)
    monkeypatch.setattr(importlib.import_module("support.results"), "environment", dict)
    for module in (camels_depth, importlib.import_module("support.results")):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return cases


def test_what_would_not_fit_is_not_run(camels_depth: Any, asked_for: list[Any]) -> None:
    limit = str(150 / 1024)
    rows = camels_depth.main(["--size", "tiny", "--strategies", "reverse", "--limit", limit])["rows"]
    assert asked_for == [("reverse", 1), ("reverse", 2)]
    assert [row.get("not run, foreseen MiB") for row in rows] == [None, None, 210.0, 310.0]


def test_cases_that_were_measured_are_kept(camels_depth: Any, asked_for: list[Any]) -> None:
    options = ["--size", "tiny", "--strategies", "reverse"]
    camels_depth.main([*options, "--depths", "4", "1"])
    rows = camels_depth.main([*options, "--resume"])["rows"]
    assert asked_for == [("reverse", depth) for depth in (4, 1, 2, 6)]
    assert [row["depth"] for row in rows] == [1, 2, 4, 6]
    del asked_for[:]
    camels_depth.main([*options, "--depths", "4", "--resume"])
    assert asked_for == []
    camels_depth.main([*options, "--depths", "4", "--resume", "--tokens", "8"])  # is another question
    assert asked_for == [("reverse", 4)]


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("reverse", {}, None),
        ("reverse", {2: 10.0}, 80.0),
        ("reverse", {1: 0.0, 2: 10.0, 4: 14.0}, 38.0),
        ("checkpointed", {4: 10.0, 9: 13.0}, 16.0),
        ("forward", {6: 10.0, 1: 9.0}, 10.0),
    ],
)
def test_what_a_case_will_take(camels_depth: Any, name: str, known: dict[int, float], expected: float | None) -> None:
    rows = {(name, depth): {"peak MiB": peak} for depth, peak in known.items()}
    rows[("other", 3)] = {"peak MiB": 1e6}
    rows[(name, 5)] = {"error": "out of memory"}
    assert camels_depth.foreseen(name, 16, rows) == expected
