"""Published modules: a row that runs where its package is installed, and what the documentation says of all."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bilevel import SGD, Episode, ReverseUnroll, bilevel, hypergradient

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "public_modules"
TOLERANCE = {"float64": 1e-6, "float32": 1e-2}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "public_modules.json").read_text())["results"]


def test_a_row_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="a row of benchmarks/public_modules needs its package")
    monkeypatch.syspath_prepend(str(FOLDER))
    published, oracle = (importlib.import_module(f"published{name}") for name in ("", ".oracle"))
    make = importlib.import_module("published.transformers").ROWS["BertForSequenceClassification"]
    torch.manual_seed(0)
    row = oracle.without_dropout(make())
    module, batches = row.module.double(), published.cast(row.batches, torch.float64)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    direction = {name: torch.randn_like(each) / 50 for name, each in oracle.named(module, row.outer).items()}
    wrapped = bilevel(module, inner=row.inner, outer=row.outer, inner_optimizer=SGD(lr=row.lr), inner_steps=2)
    found = hypergradient(wrapped, ReverseUnroll(), Episode([batches[0]], batches[1])).grads
    ours = sum((found[f"module.{name}"] * each).sum().item() for name, each in direction.items())
    new = lambda: oracle.without_dropout(make()).module.double()  # noqa: E731
    problem = oracle.Problem(new, state, batches, row.inner, row.outer, direction, row.lr, 2)
    assert ours == pytest.approx(problem.difference(1e-4), rel=1e-6)
    assert ours == pytest.approx(problem.backward(), rel=1e-9)


def test_enough_modules_of_enough_packages(results: dict[str, Any]) -> None:
    rows = results["rows"].values()
    assert len(rows) >= 30
    assert len({row["package"] for row in rows}) >= 8
    for row in rows:
        assert [len(row["lines"]), *map(type, map(ast.parse, row["lines"]))] == [3, *[ast.Module] * 3], row["class"]


def test_hypergradients_agree(results: dict[str, Any]) -> None:
    compared = {name: row["agreement"] for name, row in results["rows"].items() if "agreement" in row}
    assert {name: it for name, it in compared.items() if not it["error"] < TOLERANCE[it["dtype"]]} == {}


def test_the_page_shows_every_row(results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    made = importlib.import_module("tables.public_modules").tables()
    assert made["public_modules"].count("\n") == len(results["rows"]) + 1
    assert made["public_modules_lines"].count("```python") == len(results["rows"])
    page = (ROOT / "docs" / "works_with.md").read_text()
    assert [name for name in made if f"_generated/{name}.md" not in page] == []
    assert {path.stem for path in (FOLDER / "recipes").glob("*.py")} == set(results["recipes"])
