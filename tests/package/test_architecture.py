"""Imports point down: a file knows what is below it, and nothing above or beside it. Each has tests of its name."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_bilevel

PACKAGE = "lightning_bilevel"
ROOT = Path(lightning_bilevel.__file__).parent

# From the ground up. A file, or a folder of them, imports from lines above its own; the files of one folder also from
# each other, without a circle.
LAYERS = [
    ("tree", "errors", "host"),  # nothing of ours
    ("kernels",),
    ("randomness",),
    ("inner_optimizers", "directions", "linear_solvers"),
    ("problem",),
    ("calculus",),
    ("modules", "data", "few_shot"),
    ("strategies",),
    ("estimation",),
    ("training",),
    ("auditing",),
    ("__init__",),
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
DOOR_TO_LIGHTNING = "host"

TESTS = Path(__file__).parents[1]
WITHOUT_TESTS_OF_ITS_NAME = {
    "strategies.forward_unroll": "exact, and without a part of its own: the properties of the table say all there is",
    "modules.examine": "redesign",
    "modules.hooks": "redesign",
    "modules.swap": "redesign",
}
"""Files that are tested elsewhere, and why."""


def sources() -> dict[str, str]:
    """Return the text of every file of the package by its dotted name below the package: ``"strategies.base"``."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    return {name: path.read_text(encoding="utf-8") for name, path in files.items()}


def imports(text: str) -> Iterator[tuple[ast.stmt, str]]:
    """Yield every imported module, or module and name, as a dotted name."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            yield from ((node, f"{dots}{node.module or ''}.{alias.name}") for alias in node.names)


def own(name: str, files: dict[str, str]) -> str | None:
    """Return the file of the package that a dotted name comes from: the longest that exists."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    below = parts[1:]
    for length in range(len(below), -1, -1):
        for candidate in (".".join(below[:length]), ".".join([*below[:length], "__init__"])):
            if candidate in files:
                return candidate
    raise AssertionError(f"no file for {name}")


def violations(files: dict[str, str]) -> list[str]:
    """Return what is wrong with the imports, a sentence each."""
    found, graph = [], {}
    for file, text in files.items():
        room = file.split(".")[0]
        if room not in LAYER:
            found.append(f"{file} has no layer: give it a line in LAYERS.")
            continue
        graph[file] = set()
        for node, name in imports(text):
            where = f"{file}, line {node.lineno}: imports {name}"
            if name.startswith("."):
                found.append(f"{where}, a relative import: write its whole name.")
                continue
            if (
                name.split(".")[0] in ("pytorch_lightning", "lightning", "lightning_fabric")
                and room != DOOR_TO_LIGHTNING
            ):
                found.append(f"{where}: take it from {PACKAGE}.{DOOR_TO_LIGHTNING}.")
            target = own(name, files)
            if target is None:
                continue
            graph[file].add(target)
            other = target.split(".")[0]
            inside = other == room and "." in file
            if not inside and other in LAYER and LAYER[other] >= LAYER[room]:
                found.append(f"{where}, from layer {LAYER[other]}, but is itself in layer {LAYER[room]}.")
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = [node for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))]
                found += [f"{file}, line {node.lineno}: an import inside `{function.name}`." for node in inner]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"a circle: {' -> '.join(error.args[1])}.")
    return found


def test_imports_point_down():
    found = violations(sources())
    assert not found, "\n".join(found)


def without_tests(files: Iterable[str], there: Iterable[str]) -> set[str]:
    """Return the files of rooms, but for ``__init__``, that have no ``<room>.test_<file>``."""
    parts = [file.split(".") for file in files]
    wanted = {f"{room}.{file}": f"{room}.test_{file.lstrip('_')}" for room, *rest in parts for file in rest}
    there = set(there)
    return {file for file, test in wanted.items() if test not in there and not file.endswith("__init__")}


def test_every_file_has_tests_of_its_name():
    """Below `tests/`, in the folder that is named like its own."""
    there = {".".join(path.relative_to(TESTS).with_suffix("").parts) for path in TESTS.glob("*/test_*.py")}
    assert without_tests(sources(), there) == set(WITHOUT_TESTS_OF_ITS_NAME)


def test_a_file_without_tests_is_found():
    files = ["tree", "data.__init__", "data.inputs", "data._common", "data.news"]
    assert without_tests(files, ["data.test_inputs", "data.test_common", "properties.test_news"]) == {"data.news"}


def test_every_layer_exists():
    assert {name.split(".")[0] for name in sources()} == set(LAYER)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        (
            "problem",
            "from lightning_bilevel.training.module import BilevelModule",
            "problem, line 1: imports .*, from layer",
        ),
        (
            "problem",
            "from lightning_bilevel.calculus import inner_loop",
            "problem, line 1: imports .*, from layer 3, but",
        ),
        (
            "tree",
            "from lightning_bilevel import Episode",
            "tree, line 1: imports lightning_bilevel.Episode, from layer",
        ),
        ("tree", "import lightning_bilevel.errors", "tree, line 1: imports lightning_bilevel.errors, from layer 0"),
        ("tree", "from . import errors", "tree, line 1: imports ..errors, a relative import"),
        ("tree", "import pytorch_lightning as pl", "tree, line 1: imports pytorch_lightning: take it from"),
        ("tree", "def f():\n    import math", "tree, line 2: an import inside `f`"),
        ("strategies.base", "from lightning_bilevel.strategies import FirstOrder", "a circle: "),
        ("news", "", "news has no layer"),
    ],
)
def test_the_check_can_fail(file, line, message):
    files = sources()
    files[file] = f"{line}\n{files.get(file, '').replace('from __future__ import annotations', '')}"
    with pytest.raises(AssertionError, match=f"^{message}"):
        raise AssertionError("\n".join(violations(files)))


def test_public_names_exist_and_are_sorted_once():
    names = lightning_bilevel.__all__
    assert [name for name in names if not hasattr(lightning_bilevel, name)] == []
    assert len(set(names)) == len(names)
    for folder in ("directions", "inner_optimizers", "linear_solvers", "strategies"):
        module = getattr(lightning_bilevel, folder)
        assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_the_import_brings_no_heavy_package_along():
    script = (
        "import sys, pytorch_lightning; before = set(sys.modules); import lightning_bilevel; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    brought = set(done.stdout.split())
    assert PACKAGE in brought
    assert not brought & {"transformers", "matplotlib", "sklearn", "jsonargparse", "rich", "higher", "scipy"}
