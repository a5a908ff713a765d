"""The cheat sheet names every hook, argument, strategy, solver, sampler, inner optimizer and logged name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import lightning_bilevel
from lightning_bilevel import BilevelModule, bilevel, directions, inner_optimizers, linear_solvers, strategies
from lightning_bilevel.modules.hooks import BilevelHooks

ROOT = Path(__file__).parents[2]
SHEET = (ROOT / "docs" / "cheat_sheet.md").read_text()
BASES = {"HypergradientStrategy", "DirectionSampler", "Key", "LinearSolver", "LinearSystem", "Solution"}


def hooks() -> list[str]:
    """Return the methods that a user overrides, and the one to call."""
    found = [name for name, value in vars(BilevelHooks).items() if inspect.isfunction(value) and name[0] != "_"]
    return [*(name for name in found if name != "missing_hooks"), "configure_optimizers", "adapted"]


def arguments() -> set[str]:
    own = {*inspect.signature(BilevelModule.__init__).parameters, *inspect.signature(bilevel).parameters}
    return own - {"self", "module"}


NAMES = {
    "hooks": hooks(),
    "arguments": arguments(),
    "strategies": set(strategies.__all__) - BASES,
    "solvers": set(linear_solvers.__all__) - BASES,
    "directions": set(directions.__all__) - BASES,
    "inner optimizers": [
        name for name in inner_optimizers.__all__ if name in lightning_bilevel.__all__ or name == "PerStep"
    ],
}


@pytest.mark.parametrize("kind", NAMES)
def test_it_names(kind: str) -> None:
    assert len(NAMES[kind]) > 4
    assert [name for name in NAMES[kind] if not re.search(rf"`[^`]*\b{name}\b[^`]*`", SHEET)] == []


def test_it_names_what_is_logged() -> None:
    """Each literal name of a metric in the source, whichever strategy or callback logs it."""
    source = "\n".join(path.read_text() for path in (ROOT / "lightning_bilevel").rglob("*.py"))
    metric = r'"(hypergradient_[a-z_]+|[a-z]+_(?:residual|gap|weight)|skipped_steps|inner_loss|outer_loss)"'
    logged = set(re.findall(rf"metrics\[{metric}\]|{metric}:|log\({metric}", source))
    names = {name for group in logged for name in group if name}
    assert {"hypergradient_cosine", "skipped_steps", "inner_residual", "value_gap", "outer_loss"} <= names
    assert [name for name in names if f"`{name}`" not in SHEET] == []
