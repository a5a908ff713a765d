"""What the pages of the reference show beside a docstring: formulas, the members of a class, and what uses it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from formulas import FORMULAS

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"
LISTS = {"api", "changelog", "papers", "cheat_sheet"}
"""Pages that name everything; they use nothing."""

MEMBERS = {
    "BilevelModule": "inner_parameters outer_parameters inner_loss outer_loss configure_inner_optimizer "
    "initial_inner_parameters outer_loss_weights episodes solve_inner adapted",
    "Hypergradient": "carry",
    "Carry": "of",
    "auditing.AuditRow": "works",
    "HypergradientSchedule": "phase",
    "HypergradientStrategy": "estimate averaged explained members refusals trainer_refusals all_refusals second_order",
    "strategies.directional.DirectionalStrategy": "slopes",
    "inner_optimizers.PerStep": "at",
    "inner_optimizers.InnerOptimizer": "init update",
    "linear_solvers.LinearSolver": "solve check make_preconditioner",
    "directions.DirectionSampler": "flat draw of error",
    "directions.Key": "fold_in generator seed",
    "few_shot.FewShotTasks": "num_classes",
    "few_shot.TaskDataset": "draw",
    "problem.BilevelProblem": "batches start vmapped",
    "problem.InnerState": "flat unflat detach map stack cat",
    "randomness.Call": "bounds",
    "calculus.InnerStep": "__call__ graph vjp jvp products",
    "testing.SolvedModule": "solution unrolled plain episode",
    "testing.Quadratic": "optimum",
    "testing.Ridge": "optimum",
}
"""The members on the page of a class, in this order; other classes have none."""


def entries() -> list[str]:
    """Return the full names that ``api.md`` lists, in its order."""
    module, found = "", []
    for line in (DOCS / "api.md").read_text().splitlines():
        if there := re.fullmatch(r"\.\. currentmodule:: (\S+)", line):
            module = there[1]
        elif there := re.fullmatch(r"   ([A-Za-z]\w*)", line):
            found.append(f"{module}.{there[1]}")
    return found


def pages() -> list[Path]:
    """Return the pages of the documentation that may use a name."""
    found = [
        path
        for room in (".", "results", "tutorials")
        for path in (DOCS / room).glob("*")
    ]
    return sorted(
        path
        for path in found
        if path.suffix in (".md", ".ipynb") and path.stem not in LISTS
    )


def used_in() -> dict[str, list[str]]:
    """Return, for each entry, links to the pages and paths of the examples whose programs or text name it."""
    texts = {
        f":doc:`/{path.relative_to(DOCS).with_suffix('')}`": path.read_text()
        for path in pages()
    }
    texts |= {
        f"``{path.relative_to(DOCS.parent)}``": path.read_text()
        for path in sorted(EXAMPLES.rglob("*.py"))
    }
    texts = {place: text for place, text in texts.items() if "/tests/" not in place}
    words = {
        place: set(re.findall(r"\w+", "\n".join(code(text))))
        for place, text in texts.items()
    }
    return {
        name: [place for place in words if name.rpartition(".")[2] in words[place]]
        for name in entries()
    }


def code(text: str) -> list[str]:
    """Return what is code in a page: between backticks; a program is all code."""
    return re.findall(r"```.*?```|`[^`\n]+`", text, re.S) if "```" in text else [text]


def context() -> dict[str, dict[str, Any]]:
    """Return what the templates of autosummary know beside the object."""
    members = {
        f"lightning_bilevel.{name}": listed.split() for name, listed in MEMBERS.items()
    }
    return {"used_in": used_in(), "shown": members, "formulas": FORMULAS}
