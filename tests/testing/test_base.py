"""What the properties have in common."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch

from lightning_bilevel import FSLA, FirstOrder, HypergradientStrategy, ImplicitGradient, ReverseUnroll
from lightning_bilevel.linear_solvers import Dense
from lightning_bilevel.testing.base import (
    DIFFERENCES,
    EXACT,
    accepted,
    accepts,
    assert_close,
    generator_states,
    rounding,
    same,
    strategy_property,
)
from lightning_bilevel.testing.problems import Initialization, Quadratic, Rates, Several

T = torch.tensor


def test_the_problem_is_the_first_that_is_not_refused() -> None:
    assert isinstance(accepted(ReverseUnroll(), Several, Quadratic), Several)
    module = accepted(FSLA(), Several)
    assert isinstance(module, Several)
    assert (module.inner_start, module.inner_steps) == ("warm", 1)
    proximal = accepted(ImplicitGradient(Dense()), Initialization, Rates)
    assert isinstance(proximal, Quadratic)  # neither of both will do
    assert accepts(FSLA(), Several, inner_start="reset") is None


def test_what_is_close() -> None:
    expected = {"a": T([1.0, 100.0]), "b": T(0.0)}
    assert_close("x", {"a": T([1.0, 100.0 + 1e-5]), "b": T(1e-8)}, expected, 1e-6)
    with pytest.raises(AssertionError, match=r"^x is of \['a'\], instead of \['a', 'b'\]"):
        assert_close("x", {"a": T([1.0, 100.0])}, expected, 1e-6)
    with pytest.raises(AssertionError, match=r"^x of `a` has shape \(1, 2\), not \(2,\)"):
        assert_close("x", {"a": T([[1.0, 100.0]]), "b": T(0.0)}, expected, 1e-6)
    with pytest.raises(AssertionError, match=r"^x of `b` is off by 0\.01: \[0\.01\] instead of \[0\.0\]"):
        assert_close("x", {"a": T([1.0, 100.0]), "b": T(0.01)}, expected, 1e-6)
    with pytest.raises(AssertionError, match=r"^x of `a` is off by nan"):
        assert_close("x", {"a": T([1.0, float("nan")]), "b": T(0.0)}, expected, 1e-6)


class Thing:
    def __init__(self, value: Any) -> None:
        self.value = value


def test_what_is_the_same() -> None:
    assert same(Thing([T(1.0), {"a": 2}]), Thing([T(1.0), {"a": 2}]))
    assert not same(Thing([T(1.0), {"a": 2}]), Thing([T(1.0), {"a": 3}]))
    assert not same(1, 1.0)
    assert not same({"a": 1}, {"b": 1})
    assert not same((1, 2), (1, 2, 3))
    assert not same(T(1.0), T(1.0, dtype=torch.float64))
    assert same(ImplicitGradient(Dense()), ImplicitGradient(Dense()))


def test_differences_are_compared_with_more_room() -> None:
    assert rounding(ReverseUnroll()) == EXACT < DIFFERENCES == rounding(FirstOrder())


def test_warnings_and_generators_are_the_property_s_own() -> None:
    @strategy_property
    def warns_and_draws(strategy: HypergradientStrategy) -> None:
        warnings.warn("of no interest", stacklevel=1)
        torch.rand(1)
        random.random()

    before = generator_states()
    warns_and_draws(FirstOrder())
    assert generator_states() == before
