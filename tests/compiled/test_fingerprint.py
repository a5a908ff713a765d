"""Problems that are made anew are known again; others are others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_bilevel.compiled.fingerprint import fingerprint
from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.problem import BilevelProblem, with_proximal
from lightning_bilevel.strategies.penalty_gradient import with_outer_loss
from lightning_bilevel.testing import Quadratic
from tests.support.compiled import episode, weighted


def test_the_same_functions_made_anew_are_the_same() -> None:
    module = weighted()
    first, second = module.functional(), module.functional()
    for make in (
        lambda problem: problem,
        lambda problem: with_proximal(problem, 0.5),
        lambda problem: problem.vmapped(3, over="episodes"),
        lambda problem: problem.vmapped(3, over="phi"),
        lambda problem: with_proximal(problem, 0.5).vmapped(3, over="episodes"),
    ):
        a, b = fingerprint(make(first.problem)), fingerprint(make(second.problem))
        assert a.key == b.key
        assert hash(a.key) == hash(b.key)
        assert a.functional is first


def test_other_functions_are_others() -> None:
    problem = weighted().functional().problem
    problems = [
        problem,
        with_proximal(problem, 0.5),
        with_proximal(problem, 0.7),
        problem.vmapped(2, over="episodes"),
        problem.vmapped(3, over="episodes"),
        problem.vmapped(3, over="phi"),
        replace(problem, elementwise=not problem.elementwise),
        replace(problem, inner_loss=lambda *args: problem.inner_loss(*args)),
        replace(problem, inner_loss=lambda *args: problem.inner_loss(*args)[0]),
    ]
    keys = [fingerprint(each).key for each in problems]
    assert len(set(keys)) == len(keys)


def scaled(problem: BilevelProblem, weight: Any) -> BilevelProblem:
    return replace(problem, inner_loss=lambda *args: (weight * problem.inner_loss(*args)[0], {}))


def test_tensors_that_a_loss_holds_are_found_and_only_their_shapes_count() -> None:
    problem, weights = weighted().functional().problem, [torch.tensor(value) for value in (2.0, 3.0)]
    first, second = (fingerprint(scaled(problem, weight)) for weight in weights)
    assert first.key == second.key
    assert [each.held[0] is weight for each, weight in zip((first, second), weights, strict=True)] == [True, True]
    keys = {fingerprint(scaled(problem, weight)).key for weight in (2.0, 3.0, weights[0], torch.ones(1), {"w": 2.0})}
    assert len(keys) == 5
    as_laid_out = [fingerprint(scaled(problem, weight)).key for weight in (torch.ones(2, 2), torch.ones(2, 2).mT)]
    assert as_laid_out[0] != as_laid_out[1]


@pytest.mark.parametrize(
    ("held", "because"),
    [
        (torch.ones(1, requires_grad=True), "a tensor with a graph"),
        (object(), "an object, object"),
        ([2.0], "an object, list"),
    ],
)
def test_a_loss_that_holds_something_else_is_not_known_again(held: Any, because: str) -> None:
    problem = weighted().functional().problem
    with pytest.raises(NotCompiled, match=f"the strategy steps on a loss of its own, which holds {because}"):
        fingerprint(scaled(problem, held))


def test_the_outer_batch_that_a_loss_holds_is_found() -> None:
    problem, given = weighted().functional().problem, episode()
    made_of = fingerprint(with_outer_loss(problem, given, 0.5))
    assert made_of.judged == [given.outer]
    assert made_of.calls == {"_inner_loss", "_outer_loss", "_update"}
    assert all(a is b for a, b in zip(made_of.held, given.outer, strict=True))
    assert made_of.key == fingerprint(with_outer_loss(problem, episode(1), 0.5)).key
    assert made_of.key != fingerprint(with_outer_loss(problem, given, 0.6)).key
    assert made_of.key != fingerprint(with_outer_loss(problem, episode(examples=3), 0.5)).key


def test_a_loss_that_calls_what_is_not_watched_is_refused() -> None:
    problem = weighted().functional().problem
    drawn = replace(problem, inner_loss=lambda *args: (problem.initial({}, {}), {}))
    with pytest.raises(NotCompiled, match="the strategy steps on a loss of its own"):
        fingerprint(drawn)


def test_the_functions_that_count_are_those_that_are_asked_for() -> None:
    problem = weighted().functional().problem
    assert fingerprint(problem, "outer_loss").calls == {"_outer_loss"}
    assert fingerprint(problem.stationary(), "inner_loss").calls == {"_inner_loss", "_penalty"}
    assert fingerprint(problem.stationary().vmapped(2, over="episodes"), "inner_loss").calls == {
        "_inner_loss", "_penalty",
    }  # fmt: skip


def test_a_plain_problem_is_that_of_no_module() -> None:
    problem = Quadratic().plain().problem
    with pytest.raises(NotCompiled):
        fingerprint(problem)
