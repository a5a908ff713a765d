"""The words of a warning."""

from __future__ import annotations

from lightning_bilevel.compiled.reasons import NotCompiled, reason


def test_the_cause_is_told() -> None:
    error = RuntimeError("the backend failed")
    error.__cause__ = NotCompiled("a loss draws.\nAnd more.")
    assert reason(error) == "a loss draws."


def test_an_error_without_words_is_told_by_its_kind() -> None:
    assert reason(ValueError()) == "ValueError"
