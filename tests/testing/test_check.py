"""``check_strategy`` passes for every strategy of this package, and names what a broken one lacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bilevel import (
    BOME,
    DARTS,
    FSLA,
    MEHA,
    PES,
    PZOBO,
    SOBA,
    EvoGrad,
    FirstOrder,
    ForwardGradient,
    ForwardUnroll,
    GammaGreedy,
    HypergradientSchedule,
    HypergradientStrategy,
    ImplicitGradient,
    PenaltyGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
)
from lightning_bilevel.linear_solvers import Neumann
from lightning_bilevel.strategies.base import every_strategy
from lightning_bilevel.testing import check, check_strategy
from lightning_bilevel.testing.check import PROPERTIES

FAST = {
    "ReverseUnroll": ReverseUnroll(),
    "ReverseUnroll-sqrt": ReverseUnroll(checkpoint="sqrt"),
    "TruncatedReverse": TruncatedReverse(),
    "ForwardUnroll": ForwardUnroll(),
    "FirstOrder": FirstOrder(),
    "GammaGreedy": GammaGreedy(0.9),
    "ImplicitGradient": ImplicitGradient(Neumann(3, step_size=0.1)),
    "FSLA": FSLA(),
    "PenaltyGradient": PenaltyGradient(),
    "DARTS": DARTS(),
    "EvoGrad": EvoGrad(3),
    "ZerothOrder": ZerothOrder(3),
    "PZOBO": PZOBO(3),
    "PES": PES(2),
    "PZOBO-remembering": PZOBO(3, guide=FirstOrder(), remember=True),
    "HypergradientSchedule": HypergradientSchedule([(TruncatedReverse(1), 1), (FirstOrder(), None)]),
}
JOINT = {"BOME": BOME(eta=5.0), "MEHA": MEHA(), "SOBA": SOBA(), "SOBA-table": SOBA(momentum="table")}
"""Their step of θ is not that of the inner run alone. With a smaller η, BOME's λ is 0 there, and no mask reaches it."""
SLOW = {
    "ForwardUnroll-forward": ForwardUnroll(chunk_size=2, mode="forward"),
    "ForwardGradient": ForwardGradient(3),
    "ForwardGradient-forward": ForwardGradient(3, mode="forward"),
    "ForwardGradient-guided": ForwardGradient(3, guide=TruncatedReverse(1)),
    "ForwardGradient-remembering": ForwardGradient(3, remember=True),
    "ForwardGradient-guided twice": ForwardGradient(4, guide=[TruncatedReverse(1), GammaGreedy()], remember=True),
    "ForwardGradient-guided by FSLA": ForwardGradient(3, guide=FSLA()),
    "HypergradientSchedule-FSLA": HypergradientSchedule([(FSLA(), 2), (ForwardGradient(3), None)]),
}
EVERY = [
    *(pytest.param(strategy, id=name) for name, strategy in FAST.items()),
    *(pytest.param(strategy, id=name, marks=pytest.mark.slow) for name, strategy in SLOW.items()),
]


@pytest.mark.parametrize("strategy", EVERY)
def test_the_strategies_of_this_package(strategy: HypergradientStrategy) -> None:
    check_strategy(strategy)


@pytest.mark.parametrize("strategy", JOINT.values(), ids=JOINT)
def test_joint_steps_of_both_levels(strategy: HypergradientStrategy) -> None:
    check_strategy(strategy, properties=PROPERTIES.keys() - {"takes_the_inner_run"})


def test_every_strategy_is_among_them() -> None:
    assert {type(strategy) for strategy in (FAST | JOINT | SLOW).values()} == set(every_strategy())


def test_forward_gradients_in_short() -> None:
    """All but the mean over many seeds."""
    check_strategy(ForwardGradient(2), properties=PROPERTIES.keys() - {"is_unbiased_where_it_says_so"})


class Half(FirstOrder):
    """Broken: neither exact, nor frozen."""

    exact = unbiased = True
    seen = 0

    def estimate(self, *args: Any) -> Any:
        self.seen += 1
        return super().estimate(*args)


def test_the_first_property_that_fails_is_named() -> None:
    with pytest.raises(AssertionError, match=r"^`Half\(\)` fails `is_exact_where_it_says_so`: on `Quadratic`, ∇h"):
        check_strategy(Half())
    with pytest.raises(AssertionError, match=r"^`Half\(\)` fails `is_frozen`: an estimate changes \['`seen`'\]"):
        check_strategy(Half(), properties=["is_frozen", "is_exact_where_it_says_so"])


def test_an_error_counts_as_a_failure() -> None:
    class Stopping(FirstOrder):
        def estimate(self, *args: Any) -> Any:
            raise KeyError("widget")

    message = r"^`Stopping\(\)` fails `estimates_every_outer_parameter`: KeyError: 'widget'"
    with pytest.raises(AssertionError, match=message) as raised:
        check_strategy(Stopping())
    assert isinstance(raised.value.__cause__, KeyError)


def test_unknown_properties_are_refused() -> None:
    message = r"^Expected `check_strategy\(properties=\.\.\.\)` to be names among states_facts, .*, got \['is_nice'\]"
    with pytest.raises(ValueError, match=message):
        check_strategy(FirstOrder(), properties=["is_nice"])


def test_processes_are_started_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[HypergradientStrategy] = []
    monkeypatch.setitem(check.PROCESSES, "trains_in_two_processes", started.append)
    strategy = FirstOrder()
    check_strategy(strategy, properties=["states_facts"])
    assert started == []
    check_strategy(strategy, properties=["states_facts"], ddp=True)
    assert started == [strategy]


def test_every_property_says_what_it_is() -> None:
    assert all(each.__doc__ and each.__name__ == name for name, each in {**PROPERTIES, **check.PROCESSES}.items())


def test_generators_are_as_before() -> None:
    before = torch.get_rng_state()
    check_strategy(FirstOrder(), properties=["draws_by_its_key", "resumes"])
    assert torch.equal(torch.get_rng_state(), before)


def test_no_file_knows_pytest() -> None:
    sources = Path(check.__file__).parent.glob("*.py")
    assert not [path.name for path in sources if "import pytest" in path.read_text(encoding="utf-8")]


@pytest.mark.slow
def test_it_imports_without_pytest() -> None:
    script = "import sys; sys.modules['pytest'] = None; import lightning_bilevel.testing"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
