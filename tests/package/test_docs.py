"""The documentation is true: its programs run, and it names everything that is public."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import re
import sys
import types
import warnings
from collections.abc import Iterator
from doctest import DocTestFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from tests.support.seeds import forked
from tests.support.stubs import NOT_USED, Stubs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(page for room in (".", "results") for page in (DOCS / room).glob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[\w ]+): (?P<why>.+?) -->\n)?^```python\n(?P<code>.*?)^```$"
    r"(?:\n\nIt prints:\n\n```text\n(?P<prints>.*?)^```$)?",
    re.M | re.S,
)
ALONE = {"recipes.md", "extending.md", "methods.md"}
"""Pages whose programs are complete: each runs in a namespace of its own. Elsewhere a page is one program."""
LONGEST = 45
"""Lines of a program on such a page, without empty ones."""
WIDEST = 88
"""Columns of code that a page shows without scrolling."""

MODULES = [
    "lightning_bilevel",
    *(
        f"lightning_bilevel.{name}"
        for name in ("directions", "few_shot", "inner_optimizers", "linear_solvers", "strategies", "testing")
    ),
]


class Block(NamedTuple):
    """A program in a page.

    Attributes:
        line: where it begins.
        code: the program.
        mark: what a comment above it says: ``not run`` and a reason, or ``needs`` and the names of packages.
        why: the reason, or the names.
        prints: what the page says that it prints.
    """

    line: int
    code: str
    mark: str | None
    why: str
    prints: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        found.append(Block(line, match["code"], match["mark"], match["why"] or "", match["prints"]))
    return found


def missing(block: Block) -> list[str]:
    """Return the packages that a block needs and that are not installed."""
    names = block.why.split(", ") if block.mark == "needs" else []
    return [name for name in names if importlib.util.find_spec(name) is None]


@contextlib.contextmanager
def surroundings(block: Block) -> Iterator[None]:
    """Let a block that needs other packages import them: what they warn of is theirs, and what they miss is stubbed."""
    if block.mark != "needs":
        yield
        return
    before, stubs = set(sys.modules), Stubs()
    sys.meta_path.append(stubs)  # at the end: what is installed is found first
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.meta_path.remove(stubs)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("learn2learn", *NOT_USED):
                del sys.modules[name]


def execute(page: Path, block: Block, namespace: dict[str, Any]) -> None:
    """Run a block as a user would, in ``__main__``; a traceback shows the line of the page."""
    code = compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True)
    printed = io.StringIO()
    with surroundings(block), contextlib.nullcontext() if block.prints is None else contextlib.redirect_stdout(printed):
        exec(code, namespace)
    assert block.prints in (None, printed.getvalue())


def marked(page: Path) -> Any:
    """Return a page as a parameter; the whole run of the README takes half a minute."""
    return pytest.param(page, marks=[pytest.mark.slow] if page.name == "README.md" else [], id=page.name)


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if blocks(page)])
def test_programs_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)  # where `torch.compile` looks globals up
    left_out, namespace = set(), vars(main)
    with forked(0):
        for block in blocks(page):
            if block.mark == "not run":
                continue
            if absent := missing(block):
                left_out.update(absent)
                continue
            execute(page, block, {"__name__": "__main__"} if page.name in ALONE else namespace)
    if left_out:
        pytest.skip(f"all but the programs that need {', '.join(sorted(left_out))} ran")


def test_the_readme_runs_for_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found, namespace = blocks(ROOT / "README.md"), {"__name__": "__main__"}
    assert any("max_steps=" in block.code for block in found)
    with forked(0):
        for block in found:
            short = re.sub(r"max_steps=\d+", "max_steps=3", block.code)
            execute(ROOT / "README.md", block._replace(code=short, prints=None), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_marks_are_known(page: Path) -> None:
    """A program is left out only by a comment that says why."""
    assert {block.mark for block in blocks(page)} <= {None, "needs", "not run"}
    assert len(blocks(page)) == page.read_text().count("```python")


@pytest.mark.parametrize("name", sorted(ALONE))
def test_programs_are_short(name: str) -> None:
    for block in blocks(ROOT / "docs" / name):
        lines = [line for line in block.code.splitlines() if line.strip()]
        assert len(lines) <= LONGEST, f"{name}, line {block.line + 1}: {len(lines)} lines"


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_code_fits_the_page(page: Path) -> None:
    """In fences of any language; what a page includes, too, but for what is printed for a terminal."""
    text = page.read_text()
    fences = [code for kind, code in re.findall(r"^```(.*?)\n(.*?)^```$", text, re.M | re.S) if kind[:1] != "{"]
    included = re.findall(r"^```\{literalinclude\} (\S+)$", text, re.M)
    code = [*fences, *((page.parent / file).read_text() for file in included)]
    assert [line for part in code for line in part.splitlines() if len(line) > WIDEST] == []


def test_a_program_that_fails_fails_the_test(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Text.\n\n```python\nx = 1\n```\n\n<!-- not run: why -->\n```python\n1 / 0\n```\n```python\ny\n```\n"
    )
    first, skipped, last = blocks(page)
    assert (first.code, skipped.mark, skipped.why) == ("x = 1\n", "not run", "why")
    namespace: dict[str, Any] = {}
    execute(page, first, namespace)
    assert namespace["x"] == 1
    with pytest.raises(NameError, match="'y'") as error:
        execute(page, last, namespace)
    assert error.traceback[-1].lineno + 1 == last.line + 1 == 12


# --- What is public ---


def docs_module(name: str) -> Any:
    """Import a module of ``docs/``, which is on the path of Sphinx and not on that of tests."""
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DOCS))


def public() -> dict[str, Any]:
    """Return every public class and function by its full name, from the module that is the shortest way to it."""
    found: dict[int, tuple[str, Any]] = {}
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, ModuleType):
                found.setdefault(id(value), (f"{module.__name__}.{name}", value))
    return dict(found.values())


def documented() -> dict[str, Any]:
    """Return what the reference documents, a page each, by its full name."""
    found = {}
    for full in docs_module("reference").entries():
        owner, _, attribute = full.rpartition(".")
        found[full] = getattr(importlib.import_module(owner), attribute)
    return found


def test_every_public_name_is_in_the_reference() -> None:
    there = {id(value) for value in documented().values()}
    assert [name for name, value in public().items() if id(value) not in there] == []


def test_the_members_in_the_reference_are_those_of_a_class_in_it() -> None:
    there = documented()
    for name, members in docs_module("reference").context()["shown"].items():
        assert [member for member in members if not hasattr(there[name], member)] == [], name


def test_every_strategy_has_its_formula_on_its_page() -> None:
    strategies = importlib.import_module("lightning_bilevel.strategies")
    names = set(strategies.__all__) - {"HypergradientStrategy", "HypergradientSchedule"}
    assert set(docs_module("reference").context()["formulas"]) == names


def test_formulas_can_be_converted() -> None:
    """Here those of the strategies; a build says so of all."""
    pytest.importorskip("sphinx")
    pytest.importorskip("latex2mathml")
    mathml = docs_module("mathml").mathml
    for name, tex in docs_module("formulas").FORMULAS.items():
        made = mathml(tex, None, "block")
        assert made.startswith("<math"), name
        assert "\\" not in made, name


def test_a_class_says_where_it_is_used() -> None:
    found = docs_module("reference").context()["used_in"]
    assert ":doc:`/quickstart`" in found["lightning_bilevel.ReverseUnroll"]
    assert "``examples/maml.py``" not in found["lightning_bilevel.linear_solvers.Nystrom"]
    assert found["lightning_bilevel.testing.RidgeBlackBox"] == []


@pytest.mark.parametrize("name", sorted({**public(), **documented()}))
def test_every_public_name_has_an_example_that_runs(name: str) -> None:
    """In its own docstring, in a module whose doctests are collected."""
    value = {**public(), **documented()}[name]
    (found,) = DocTestFinder(recurse=False).find(value, name)
    assert found.examples
    assert value.__module__.startswith("lightning_bilevel.")


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, value in vars(importlib.import_module("lightning_bilevel.tree")).items()
        if inspect.isfunction(value)
    ],
)
def test_arithmetic_has_examples(name: str) -> None:
    assert ">>>" in inspect.getdoc(getattr(importlib.import_module("lightning_bilevel.tree"), name))


def test_every_strategy_is_in_the_readme_and_on_the_page_of_papers() -> None:
    strategies = importlib.import_module("lightning_bilevel.strategies")
    names = set(strategies.__all__) - {"HypergradientStrategy"}
    for page in (ROOT / "README.md", ROOT / "docs" / "papers.md", ROOT / "docs" / "choosing.md"):
        text = page.read_text()
        assert {name for name in names if f"`{name}" not in text} == set(), page.name


def test_every_page_is_in_the_table_of_contents() -> None:
    """What Sphinx says too, in milliseconds."""
    entries = re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text(), re.M)
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES[1:]} - {"index"}
    assert pages == set(entries)
    assert len(entries) == len(pages)


@pytest.mark.skipif(not (DOCS / "images").is_dir(), reason="a source distribution has no pictures")
def test_every_picture_is_there() -> None:
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_every_error_of_the_table_has_an_anchor_of_its_own() -> None:
    pytest.importorskip("sphinx")
    name = docs_module("anchors").anchor
    assert name("... has no hypergradient strategy") == "error-has-no-hypergradient-strategy"
    text = (DOCS / "troubleshooting.md").read_text()
    table = re.search(r"^\| message \|.*?\n\n", text, re.M | re.S)
    assert table is not None
    rows = table[0].strip().splitlines()[2:]
    names = [name(re.findall(r"`+(.+?)`+", row)[0] if "`" in row.split("|")[1] else row.split("|")[1]) for row in rows]
    assert len(set(names)) == len(names) > 20


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    build = pytest.importorskip("sphinx.cmd.build")
    for name in ("furo", "latex2mathml", "myst_nb"):
        pytest.importorskip(name)
    options = ["-W", "--keep-going", "-q", "-b", "html", "-D", "nb_execution_mode=off"]  # test_tutorials.py runs them
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert build.build_main([*options, str(DOCS), str(tmp_path)]) == 0
