"""Conditions whose products are those of graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bilevel import SGD, tree
from lightning_bilevel.calculus import inner_step
from lightning_bilevel.calculus.base import Condition
from lightning_bilevel.compiled import CompiledStep
from lightning_bilevel.problem import BilevelProblem, InnerState
from lightning_bilevel.tree import Params
from tests.support.compiled import episode, weighted


def conditions(
    make: Callable[[Any, InnerState, Params, Any], Condition],
    look: Callable[[BilevelProblem], BilevelProblem] = lambda problem: problem,
    **options: Any,
) -> tuple[Condition, Condition, Params, Params]:
    """Return a condition by graphs, that without, and a vector for each of both products."""
    module = weighted(optimizer=lambda module: SGD(lr=module.log_lr.exp(), momentum=0.9), **options)
    functional = module.functional()
    with functional.session():
        problem, phi = functional.problem, functional.phi()
        state = problem.start(InnerState(functional.theta()), phi)
        step = inner_step(look(problem))
        assert isinstance(step, CompiledStep)
        found = [make(each, state, phi, episode().outer) for each in (step, step.eager)]
    vector = tree.map(torch.randn_like, found[1].residual)
    return found[0], found[1], vector, phi


def same(a: Params, b: Params) -> None:
    assert a.keys() == b.keys()
    for name, value in b.items():
        torch.testing.assert_close(a[name], value)
        assert not a[name].requires_grad


@pytest.mark.parametrize("name", ["stationarity", "fixed_point"])
def test_products_any_number_of_times(name: str) -> None:
    look: Any = (lambda problem: problem.stationary()) if name == "stationarity" else lambda problem: problem
    ours, eager, v, _ = conditions(lambda step, *at: getattr(step, name)(*at), look)
    same(ours.residual, eager.residual)
    for scale in (1.0, -2.0):
        w: dict[str, Tensor] = tree.scale(v, scale)
        same(ours.transposed(w), eager.transposed(w))
        same(ours.mixed(w), eager.mixed(w))
