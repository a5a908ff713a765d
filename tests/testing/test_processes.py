"""Two processes: real ones, which are slow, and what is said of a strategy that they cannot run."""

from __future__ import annotations

import os
from typing import Any

import pytest

from lightning_bilevel import FSLA, PES, SOBA, FirstOrder, ForwardGradient, HypergradientStrategy, tree
from lightning_bilevel.problem import Hypergradient
from lightning_bilevel.testing.processes import trains_in_two_processes


def test_a_class_that_other_processes_cannot_import() -> None:
    class Local(FirstOrder):
        pass

    message = (
        r"^`Local\(\)` fails `trains_in_two_processes`: other processes cannot import it \(.*Local.*\); define its"
    )
    with pytest.raises(AssertionError, match=message):
        trains_in_two_processes(Local())


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [SOBA(momentum="table"), FSLA(), ForwardGradient(3, guide=FSLA()), PES(2)],
    ids=lambda s: type(s).__name__,
)
def test_strategies_of_this_package(strategy: HypergradientStrategy) -> None:
    trains_in_two_processes(strategy)


class ByRank(FirstOrder):
    def estimate(self, *args: Any) -> Hypergradient:
        result = super().estimate(*args)
        return result._replace(grads=tree.scale(result.grads, 1 + int(os.environ.get("LOCAL_RANK", 0))))


class Stopping(FirstOrder):
    def estimate(self, *args: Any) -> Hypergradient:
        raise ValueError("the widget is missing")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (ByRank(), r"a fit under `ddp`: φ of `weights` is off by "),
        (Stopping(), r"the processes fail:[\s\S]*the widget is missing"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_fakes(fake: HypergradientStrategy, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"fails `trains_in_two_processes`: {message}"):
        trains_in_two_processes(fake)
