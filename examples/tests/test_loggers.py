"""Loggers of the examples have a name and no version: a progress bar shows the last four letters of a version."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1]


def loggers() -> list[ast.Call]:
    """Return every call that makes a logger of Lightning's."""
    files = [path for path in EXAMPLES.rglob("*.py") if path.parent.name != "tests"]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    return [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("CSVLogger")]


@pytest.mark.parametrize("call", loggers(), ids=ast.unparse)
def test_no_version_is_a_word(call: ast.Call) -> None:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    version = given.get("version", call.args[2] if len(call.args) > 2 else None)
    assert version is not None
    assert ast.literal_eval(version) == ""
