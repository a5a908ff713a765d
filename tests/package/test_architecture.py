"""Imports point down: a file knows what is below it, and nothing above or beside it. Each has tests of its name.

``python -m tests.package.test_architecture`` writes the table of the layers into CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_bilevel

PACKAGE = "lightning_bilevel"
ROOT = Path(lightning_bilevel.__file__).parent

# From the ground up. A file, or a folder of them, imports from lines above its own; the files of one folder also from
# each other, without a circle. It stands as low as that allows.
LAYERS = [
    ("tree", "errors", "host", "generators", "stacking"),  # nothing of ours
    ("randomness", "kernels", "inner_optimizers", "linear_solvers"),
    ("directions", "problem"),
    ("calculus", "modules", "data", "few_shot"),
    ("strategies", "compiled"),
    ("estimation",),
    ("training",),
    ("auditing",),
    ("testing", "__init__"),
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
DOOR_TO_LIGHTNING = "host"

TESTS = Path(__file__).parents[1]
CONTRIBUTING = TESTS.parent / "CONTRIBUTING.md"
WITHOUT_TESTS_OF_ITS_NAME = {
    "kernels.inner_gradient": "by the kernels that need it: kernels/test_spectral_norm, test_lookups",
}
"""Files that are tested elsewhere, and why."""


def sources() -> dict[str, str]:
    """Return the text of every file of the package by its dotted name below the package: ``"strategies.base"``."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    return {name: path.read_text(encoding="utf-8") for name, path in files.items()}


@cache
def imports(text: str) -> list[tuple[ast.stmt, str]]:
    """Return every imported module, or module and name, as a dotted name."""
    found: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            found += [(node, f"{dots}{node.module or ''}.{alias.name}") for alias in node.names]
    return found


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


def own_imports(files: dict[str, str]) -> Iterator[tuple[str, ast.stmt, str, str]]:
    """Yield every import of a file of the package by another one: by which, the statement, the name, which file."""
    for file, text in files.items():
        for node, name in imports(text):
            target = None if name.startswith(".") else own(name, files)
            if target is not None:
                yield file, node, name, target


def room(file: str) -> str:
    """Return what stands in a layer: the folder of a file, or the file itself."""
    return file.split(".")[0]


def points_up(file: str, target: str) -> bool:
    """Return whether an import goes to the file's own layer or to one above it; within a folder none does."""
    inside = room(file) == room(target) and "." in file
    return not inside and LAYER[room(target)] >= LAYER[room(file)]


def circle(files: dict[str, str]) -> list[str]:
    """Return files that import each other in a circle; empty where there are none."""
    graph: dict[str, set[str]] = {file: set() for file in files}
    for file, _, _, target in own_imports(files):
        graph[file].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def violations(files: dict[str, str]) -> list[str]:
    """Return what is wrong with the imports, a sentence each."""
    found = [f"{file} has no layer: give it a line in LAYERS." for file in files if room(file) not in LAYER]
    for file, text in files.items():
        for node, name in imports(text):
            where = f"{file}, line {node.lineno}: imports {name}"
            if name.startswith("."):
                found.append(f"{where}, a relative import: write its whole name.")
            elif room(name) in ("pytorch_lightning", "lightning", "lightning_fabric") and file != DOOR_TO_LIGHTNING:
                found.append(f"{where}: take it from {PACKAGE}.{DOOR_TO_LIGHTNING}.")
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = [node for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))]
                found += [f"{file}, line {node.lineno}: an import inside `{function.name}`." for node in inner]
    for file, node, name, target in own_imports(files):
        if room(file) in LAYER and room(target) in LAYER and points_up(file, target):
            layers = f"from layer {LAYER[room(target)]}, but is itself in layer {LAYER[room(file)]}"
            found.append(f"{file}, line {node.lineno}: imports {name}, {layers}.")
    if round_trip := circle(files):
        found.append(f"a circle: {' -> '.join(round_trip)}.")
    return found


def table(files: dict[str, str]) -> str:
    """Return the layers in Markdown, with what stands in each in the words of its docstring, and the counts."""
    rows = []
    for number, names in enumerate(LAYERS):
        for name in names:
            source, shown = (name, f"{name}.py") if name in files else (f"{name}.__init__", f"{name}/")
            first = (ast.get_docstring(ast.parse(files[source])) or "").split("\n\n")[0].replace("\n", " ")
            words = re.sub(r"``(.+?)``", r"`\1`", re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", first))
            rows.append(f"| {number} | `{shown}` | {words} |")
    pairs = {(room(file), room(target)): points_up(file, target) for file, _, _, target in own_imports(files)}
    between = {pair: up for pair, up in pairs.items() if pair[0] != pair[1]}
    counts = (
        f"{len(LAYERS)} layers, {len(LAYER)} files or folders, {len(between)} imports between them; "
        f"{sum(between.values())} point up, {int(bool(circle(files)))} circles."
    )
    return "\n".join(["| layer | | what |", "|---|---|---|", *rows, "", counts])


BLOCK = re.compile(r"(?<=<!-- layers -->\n\n).*?(?=\n\n<!-- end of layers -->)", re.S)
"""Where the table stands in CONTRIBUTING.md."""


def test_contributing_has_the_table_of_the_layers():
    (found,) = BLOCK.findall(CONTRIBUTING.read_text(encoding="utf-8"))
    assert found == table(sources()), "`python -m tests.package.test_architecture` writes it anew"
    assert found.endswith("; 0 point up, 0 circles.")


def test_every_layer_is_as_low_as_it_can_be():
    lowest = dict.fromkeys(LAYER, 0)
    for file, _, _, target in sorted(own_imports(sources()), key=lambda found: LAYER[room(found[0])]):
        if room(file) != room(target):
            lowest[room(file)] = max(lowest[room(file)], lowest[room(target)] + 1)
    assert lowest == LAYER


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
            "from lightning_bilevel.calculus import run",
            "problem, line 1: imports .*, from layer 3, but is itself in layer 2",
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


if __name__ == "__main__":
    CONTRIBUTING.write_text(
        BLOCK.sub(lambda _: table(sources()), CONTRIBUTING.read_text(encoding="utf-8")), encoding="utf-8"
    )
