"""Problems that are made anew are known again; others are others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_bilevel.compiled.fingerprint import fingerprint
from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.problem import with_proximal
from lightning_bilevel.testing import Quadratic
from tests.support.compiled import weighted


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


def test_a_loss_that_holds_a_tensor_is_not_known_again() -> None:
    problem, weight = weighted().functional().problem, torch.tensor(2.0)
    scaled = replace(problem, inner_loss=lambda *args: (weight * problem.inner_loss(*args)[0], {}))
    with pytest.raises(NotCompiled, match="the strategy steps on a loss of its own, which holds tensors"):
        fingerprint(scaled)


def test_a_loss_that_calls_what_is_not_watched_is_refused() -> None:
    problem = weighted().functional().problem
    summed = replace(problem, inner_loss=lambda *args: (problem.inner_loss(*args)[0] + problem.outer_loss(*args), {}))
    with pytest.raises(NotCompiled, match="the strategy steps on a loss of its own"):
        fingerprint(summed)


def test_a_plain_problem_is_that_of_no_module() -> None:
    problem = Quadratic().plain().problem
    with pytest.raises(NotCompiled):
        fingerprint(problem)
