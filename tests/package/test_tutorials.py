"""The tutorials: their cells run, as a notebook would run them, in fits of two steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.seeds import forked

FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
WIDEST = 88


def cells(notebook: Path, kind: str) -> list[str]:
    """Return the source of the cells of a kind."""
    return ["".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == kind]


def test_there_are_three() -> None:
    assert [notebook.stem for notebook in NOTEBOOKS] == ["few_shot", "hyperparameters", "quickstart"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_it_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    programs = cells(notebook, "code")
    assert any("max_steps=" in program for program in programs)
    with forked(0):
        for number, program in enumerate(programs):
            short = re.sub(r"max_steps=\d+", "max_steps=2", program)
            exec(compile(short, f"{notebook.name}, program {number}", "exec", dont_inherit=True), namespace)
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_it_is_committed_without_outputs_and_fits_the_page(notebook: Path) -> None:
    found = json.loads(notebook.read_text())
    assert [cell for cell in found["cells"] if cell.get("outputs")] == []
    assert found["metadata"]["kernelspec"]["name"] == "python3"
    lines = [line for program in cells(notebook, "code") for line in program.splitlines()]
    assert [line for line in lines if len(line) > WIDEST] == []
    assert re.search(r"in .* minute on one core", cells(notebook, "markdown")[0])
