"""Schedules of strategies in a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_bilevel import (
    FSLA,
    PZOBO,
    Episode,
    FirstOrder,
    ForwardGradient,
    HypergradientSchedule,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
    hypergradient,
    tree,
)
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Dense
from tests.support.fits import Before, fit
from tests.support.modules import differing, parameters
from tests.support.problems import Mlp, RidgeBlackBox, RidgeSolver, assert_close, episodes

PHASES = [(TruncatedReverse(1), 1), (ReverseUnroll(), 1), (FirstOrder(), None)]


def test_phases_go_by_optimizer_steps() -> None:
    def norms(module: Any, episode: Episode) -> list[float]:
        return [tree.norm(hypergradient(module, strategy, episode).grads).item() for strategy, _ in PHASES]

    before = Before(norms)
    fit(HypergradientSchedule(PHASES), before, accumulate_grad_batches=2)
    phases = [0, 0, 1, 1, 2, 2]
    assert before.logged("hypergradient_phase") == phases
    expected = [norms[phase] for norms, phase in zip(before.values, phases, strict=True)]
    assert before.logged("hypergradient_norm") == pytest.approx(expected, rel=1e-12)
    assert len({round(norm, 9) for norm in before.values[0]}) == 3  # the phases differ


def test_a_resumed_fit_goes_on_in_its_phase(tmp_path: Path) -> None:
    def schedule() -> HypergradientSchedule:
        return HypergradientSchedule([(TruncatedReverse(1), 4), (ForwardGradient(2), None)])

    whole, resumed = Before(), Before()
    expected = parameters(fit(schedule(), whole, accumulate_grad_batches=2, max_epochs=2).lightning_module)
    fit(schedule(), accumulate_grad_batches=2).save_checkpoint(tmp_path / "middle.ckpt")
    options = {"accumulate_grad_batches": 2, "max_epochs": 2, "ckpt_path": tmp_path / "middle.ckpt"}
    actual = parameters(fit(schedule(), resumed, **options).lightning_module)
    assert whole.logged("hypergradient_phase") == [0] * 8 + [1] * 4
    assert resumed.logged("hypergradient_phase") == [0] * 2 + [1] * 4
    assert differing(actual, expected) == []


def test_phase_of_a_step() -> None:
    schedule = HypergradientSchedule([(FirstOrder(), 2), (FirstOrder(), 3), (FirstOrder(), None)])
    assert [schedule.phase(step) for step in (0, 1, 2, 4, 5, 10**9)] == [0, 0, 1, 1, 2, 2]
    assert HypergradientSchedule([(FirstOrder(), None)]).phase(0) == 0


def test_a_single_estimate_is_that_of_the_first_phase() -> None:
    module, (episode,) = Mlp(), episodes(1)
    result = hypergradient(module, HypergradientSchedule(PHASES), episode)
    assert_close(result.grads, hypergradient(module, TruncatedReverse(1), episode).grads, 1e-15)
    assert result.metrics["hypergradient_phase"] == 0


def test_facts_of_a_schedule_are_what_is_true_of_all_phases() -> None:
    def facts_of(*members: HypergradientStrategy) -> tuple[bool, ...]:
        schedule = HypergradientSchedule([*((member, 1) for member in members[:-1]), (members[-1], None)])
        return schedule.exact, schedule.unbiased, schedule.second_order, schedule.direction_parallel, schedule.stacks

    assert facts_of(ReverseUnroll()) == (True, True, True, False, True)
    assert facts_of(ReverseUnroll(), ForwardGradient()) == (False, True, True, False, True)
    assert facts_of(PZOBO(), ForwardGradient()) == (False, False, True, True, True)
    assert facts_of(PZOBO(), ZerothOrder()) == (False, False, False, True, True)
    assert facts_of(FirstOrder(), FSLA()) == (False, False, True, False, False)


def test_what_a_phase_refuses_is_refused() -> None:
    module, (episode,) = Mlp("SGD", shared=True), episodes(1)
    schedule = HypergradientSchedule([(TruncatedReverse(1), 5), (ImplicitGradient(Dense()), None)])
    with pytest.raises(MisconfigurationError, match="^Cannot use `ImplicitGradient` with parameters shared"):
        hypergradient(module, schedule, episode)
    ridge = RidgeSolver()
    with pytest.raises(MisconfigurationError, match="^Cannot use `TruncatedReverse` with `solve_inner`"):
        hypergradient(ridge, schedule, ridge.episode())
    nested = HypergradientSchedule([(FirstOrder(), 1), (schedule, None)])
    with pytest.raises(MisconfigurationError, match="^Cannot use `TruncatedReverse` with `solve_inner`"):
        hypergradient(ridge, nested, ridge.episode())


def test_a_schedule_as_such_refuses_nothing() -> None:
    module = RidgeBlackBox()
    schedule = HypergradientSchedule([(ImplicitGradient(Dense()), 5), (PZOBO(), None)])
    grads = hypergradient(module, schedule, module.episode()).grads
    assert_close(grads, module.optimum(module.episode()).grads, 1e-10)
    schedule = HypergradientSchedule([(PZOBO(), 5), (ReverseUnroll(), None)])
    with pytest.raises(MisconfigurationError, match="^Cannot use `ReverseUnroll` with `solve_inner`") as caught:
        hypergradient(module, schedule, module.episode())
    assert len(str(caught.value).splitlines()) == 1


def test_the_state_of_every_phase_is_kept() -> None:
    def schedule() -> HypergradientSchedule:
        return HypergradientSchedule([(ReverseUnroll(), 2), (ForwardGradient(2, guide=FSLA()), 2), (FSLA(), None)])

    one, other = schedule(), schedule()
    state = one.state_dict()
    assert state == {"phases": [{}, {"guide": {"tracked": None}}, {"tracked": None}]}
    state["phases"][2]["tracked"] = {"k": 3, "v": {}, "d": {}, "phi": {}, "theta": {}}
    other.load_state_dict(state)
    assert other.state_dict() == state


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], r"^Expected `HypergradientSchedule\(phases=\.\.\.\)` to be a list of \(strategy, steps\) that ends with"),
        (
            [(FirstOrder(), 3)],
            r"^Expected `HypergradientSchedule\(phases=\.\.\.\)` to be a list of \(strategy, steps\)",
        ),
        (
            [(FirstOrder(), 0), (FirstOrder(), None)],
            "^Expected `HypergradientSchedule steps of FirstOrder` to be a pos",
        ),
        ([(FirstOrder(), None), (FirstOrder(), None)], "^Expected `HypergradientSchedule steps of FirstOrder` to be a"),
        ([(FirstOrder(), 1.5), (FirstOrder(), None)], "^Expected `HypergradientSchedule steps of FirstOrder` to be a"),
    ],
)
def test_bad_phases(phases: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HypergradientSchedule(phases)
