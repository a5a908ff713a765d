"""The reports beside the results: their tables are those of the JSON files, and their links lead somewhere."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REPORTS = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
JUDGED = re.compile(r"\b(was to be|were to be|was meant to|\*\*missed\*\*|the main job|target is missed)\b", re.I)
"""How a report talks of what it was to show. A page for users says what is so."""


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.stem)
def test_the_tables_are_those_of_the_results(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``cd docs && python -m tables`` writes them."""
    monkeypatch.syspath_prepend(str(DOCS))
    tables = importlib.import_module("tables")
    text = report.read_text()
    assert text.count("<!-- table: ") == text.count("<!-- end -->") == len(tables.PLACE.findall(text))
    assert text == tables.filled(text)


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.stem)
def test_no_report_talks_of_what_was_to_be(report: Path) -> None:
    assert not JUDGED.search(report.read_text())


@pytest.mark.skipif(not (DOCS / "images").is_dir(), reason="a source distribution has no pictures")
@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.stem)
def test_links_of_a_report_lead_somewhere(report: Path) -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", report.read_text())
    assert [target for target in targets if not (report.parent / target).exists()] == []


def test_reports_that_pages_name_are_there() -> None:
    pages = [*DOCS.glob("*.md"), *DOCS.glob("results/*.md")]
    named = {name for page in pages for name in re.findall(r"`(benchmarks/\S+\.md)`", page.read_text())}
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_pages_for_users_have_no_reports() -> None:
    """Results are the essence, at most a quarter of the words, and no page talks of what was to be reached."""
    pages = {page: page.read_text() for page in [*DOCS.glob("*.md"), *DOCS.glob("results/*.md")]}
    assert [page.name for page, text in pages.items() if JUDGED.search(text)] == []
    words = {page: len(text.split()) for page, text in pages.items()}
    assert sum(words[page] for page in words if page.parent.name == "results") <= sum(words.values()) / 4
