"""The words of a warning."""

from __future__ import annotations

import pytest

from lightning_bilevel.compiled.reasons import NotCompiled, Refusals, reason


def test_the_cause_is_told() -> None:
    error = RuntimeError("the backend failed")
    error.__cause__ = NotCompiled("a loss draws.\nAnd more.")
    assert reason(error) == "a loss draws."


def test_an_error_without_words_is_told_by_its_kind() -> None:
    assert reason(ValueError()) == "ValueError"


def test_a_reason_is_said_once() -> None:
    refusals, error = Refusals(), NotCompiled("it draws")
    with pytest.warns(
        UserWarning, match=r"^The outer losses are not compiled: it draws\. They are computed as without"
    ):
        refusals.refuse("outer", error)
    refusals.refuse("steps", error)


def test_without_steps_all_of_the_inner_loss_is_eager() -> None:
    refusals = Refusals()
    with pytest.warns(UserWarning, match="The products with second derivatives are not compiled"):
        refusals.refuse("products", NotCompiled("no"))
    assert [refusals.holds(what) for what in ("products", "gradients", "steps", "outer")] == [True, False, False, False]
    with pytest.warns(UserWarning, match="The inner steps are not compiled"):
        refusals.refuse("steps", NotCompiled("neither"))
    assert [refusals.holds(what) for what in ("products", "gradients", "steps", "outer")] == [True, True, True, False]
