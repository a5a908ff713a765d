"""Schedules of strategies in a real Trainer."""

from __future__ import annotations

from dataclasses import replace
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
from lightning_bilevel.problem import Carry, Traits
from tests.support.fits import Before, fit
from tests.support.modules import differing, identical, parameters
from tests.support.problems import Mlp, RidgeBlackBox, RidgeSolver, assert_close, episodes
from tests.support.pure import CARRY, EPISODE, PHI, PROBLEM
from tests.support.seeds import call_of

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
    facts = ("exact", "unbiased", "second_order", "direction_parallel", "supports_stacking")

    def facts_of(*members: HypergradientStrategy) -> tuple[bool, ...]:
        schedule = HypergradientSchedule([*((member, 1) for member in members[:-1]), (members[-1], None)])
        return tuple(getattr(schedule, fact) for fact in facts)

    assert facts_of(ReverseUnroll()) == (True, True, True, False, True)
    assert facts_of(ReverseUnroll(), ForwardGradient()) == (False, True, True, False, True)
    assert facts_of(PZOBO(), ForwardGradient()) == (False, False, True, True, True)
    assert facts_of(PZOBO(), ZerothOrder()) == (False, False, False, True, True)
    assert facts_of(FirstOrder(), FSLA()) == (False, False, True, False, False)
    both = HypergradientSchedule([(TruncatedReverse(1), 1), (FSLA(), None)])
    assert both.differentiates == {"run", "inner_gradient"}


def test_what_a_phase_refuses_is_refused() -> None:
    module, (episode,) = Mlp("SGD", shared=True), episodes(1)
    schedule = HypergradientSchedule([(TruncatedReverse(1), 5), (ImplicitGradient(Dense()), None)])
    with pytest.raises(MisconfigurationError, match="^Cannot use `ImplicitGradient` with parameters shared"):
        hypergradient(module, schedule, episode)
    ridge = RidgeBlackBox()
    with pytest.raises(MisconfigurationError, match="^Cannot use `TruncatedReverse` with `solve_inner`"):
        hypergradient(ridge, schedule, ridge.episode())
    nested = HypergradientSchedule([(FirstOrder(), 1), (schedule, None)])
    with pytest.raises(MisconfigurationError, match="^Cannot use `TruncatedReverse` with `solve_inner`"):
        hypergradient(ridge, nested, ridge.episode())
    single = HypergradientSchedule([(FirstOrder(), 1), (FSLA(), None)])
    with pytest.raises(MisconfigurationError, match="^Cannot use `FSLA` with `solve_inner`"):
        hypergradient(RidgeSolver(inner_start="warm", inner_steps=1), single, ridge.episode())


def test_a_phase_through_a_solver() -> None:
    module = RidgeSolver()
    grads = hypergradient(module, HypergradientSchedule(PHASES), module.episode()).grads
    assert_close(grads, module.optimum(module.episode()).grads, 1e-10)


def test_a_schedule_as_such_refuses_nothing() -> None:
    module = RidgeBlackBox()
    schedule = HypergradientSchedule([(ImplicitGradient(Dense()), 5), (PZOBO(), None)])
    grads = hypergradient(module, schedule, module.episode()).grads
    assert_close(grads, module.optimum(module.episode()).grads, 1e-10)
    schedule = HypergradientSchedule([(PZOBO(), 5), (ReverseUnroll(), None)])
    with pytest.raises(MisconfigurationError, match="^Cannot use `ReverseUnroll` with `solve_inner`") as caught:
        hypergradient(module, schedule, module.episode())
    assert len(str(caught.value).splitlines()) == 1


def test_what_every_phase_carries_is_kept() -> None:
    problem = replace(PROBLEM, inner_steps=1, traits=Traits(warm=True))
    guided = ForwardGradient(2, guide=FSLA())
    schedule = HypergradientSchedule([(ReverseUnroll(), 2), (guided, 2), (FSLA(), None)])
    carry, steps = CARRY, []
    alone = {"phase 1": Carry(CARRY.inner), "phase 2": Carry(CARRY.inner)}
    for step in range(7):
        call = call_of(step, step=step)
        result = schedule.estimate(problem, carry, PHI, EPISODE, call)
        if step >= 2:  # each phase goes on from what it carried itself, whatever ran in between
            name, member = ("phase 1", guided) if step < 4 else ("phase 2", FSLA())
            expected = member.estimate(problem, Carry(carry.inner, alone[name].strategy), PHI, EPISODE, call)
            assert_close(result.grads, expected.grads, 1e-12)
            alone[name] = expected.carry
            assert all(identical(result.carry.of(each).strategy, kept.strategy) for each, kept in alone.items())
        carry = result.carry
        steps.append({name: int(kept["k"]) for name, kept in carry.strategy.items() if name.endswith("/k")})
    first, both = {"phase 1/guide/k": 2}, {"phase 1/guide/k": 2, "phase 2/k": 3}
    assert steps[:4] == [{}, {}, {"phase 1/guide/k": 1}, first]
    assert steps[4:] == [{**first, "phase 2/k": 1}, {**first, "phase 2/k": 2}, both]


def test_a_fit_goes_on_with_as_many_phases_as_it_had(tmp_path: Path) -> None:
    fit(HypergradientSchedule(PHASES)).save_checkpoint(tmp_path / "middle.ckpt")
    other = HypergradientSchedule([(FirstOrder(), 1), (ReverseUnroll(), None)])
    message = (
        "^Cannot use a `HypergradientSchedule` of 2 phases with this checkpoint. This is because it was written with 3"
    )
    with pytest.raises(MisconfigurationError, match=message):
        fit(other, max_epochs=2, ckpt_path=tmp_path / "middle.ckpt")
    longer = HypergradientSchedule([(TruncatedReverse(1), 5), (ReverseUnroll(), 5), (FirstOrder(), None)])
    fit(longer, max_epochs=2, ckpt_path=tmp_path / "middle.ckpt")


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
