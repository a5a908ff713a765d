"""Every strategy is public, in the table of the tests, and states its facts."""

from __future__ import annotations

from typing import Any

import pytest
from pytorch_lightning.callbacks import EarlyStopping

import lightning_bilevel
from lightning_bilevel import (
    FirstOrder,
    ForwardGradient,
    HypergradientMonitor,
    HypergradientSchedule,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    StrategyAudit,
    audit,
    hypergradient,
    strategies,
)
from lightning_bilevel.directions import Rademacher
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Neumann
from tests.support.modules import Cleaning, episode, loader, trainer
from tests.support.tables import ROWS, Row, every_strategy

EPISODE = episode()


def test_every_public_strategy_is_in_the_table() -> None:
    public = {getattr(strategies, name) for name in strategies.__all__} - {HypergradientStrategy}
    assert {type(row.strategy) for row in ROWS.values()} == public
    assert {kind.__name__ for kind in public} <= set(lightning_bilevel.__all__)


@every_strategy
def test_strategies_state_their_facts(row: Row) -> None:
    strategy = row.strategy
    facts = {"exact": bool, "unbiased": bool, "differentiates": frozenset, "memory": str, "cost": str}
    for fact, kind in facts.items():
        assert fact in vars(type(strategy)), f"{type(strategy).__name__} does not state `{fact}`"
        assert type(getattr(strategy, fact)) is kind
    for fact in ("needs_steps", "direction_parallel", "supports_stacking", "second_order"):
        assert type(getattr(strategy, fact)) is bool
    assert strategy.differentiates <= {"run", "inner_gradient"}
    assert strategy.second_order == bool(strategy.differentiates)
    assert strategy.unbiased or not strategy.exact


# --- Classes in the places of instances ---


@pytest.mark.parametrize("kind", [ReverseUnroll, ForwardGradient, HypergradientMonitor, StrategyAudit])
def test_a_class_among_the_callbacks_is_named(kind: Any) -> None:
    others = [] if issubclass(kind, HypergradientStrategy) else [ReverseUnroll()]
    fit, module = trainer(*others, kind, EarlyStopping("outer_loss", check_on_train_epoch_end=True)), Cleaning()
    message = (
        rf"^Cannot use the class `{kind.__name__}` among the callbacks\. .* Write `callbacks=\[{kind.__name__}\(\)\]`"
    )
    with pytest.raises(MisconfigurationError, match=message):
        fit.fit(module, loader())
    trainer(ReverseUnroll(), max_steps=1).fit(module, loader())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HypergradientSchedule([FirstOrder(), ReverseUnroll()]), r"HypergradientSchedule\(phases=...\)"),
        (lambda: HypergradientSchedule(ReverseUnroll()), r"HypergradientSchedule\(phases=...\)"),
        (
            lambda: HypergradientSchedule([(FirstOrder, 3), (ReverseUnroll(), None)]),
            r"HypergradientSchedule\(phases=...\)",
        ),
        (lambda: HypergradientMonitor(ReverseUnroll), r"HypergradientMonitor\(reference=...\)"),
        (lambda: ForwardGradient(2, directions=Rademacher), r"ForwardGradient\(directions=...\)"),
        (lambda: ForwardGradient(2, guide=FirstOrder), r"ForwardGradient\(guide=...\)"),
        (lambda: ImplicitGradient(Neumann), r"ImplicitGradient\(solver=...\)"),
        (lambda: StrategyAudit([ReverseUnroll]), r"StrategyAudit\(strategies=...\)"),
        (lambda: hypergradient(Cleaning(), ReverseUnroll, EPISODE), r"hypergradient\(strategy=...\)"),
        (lambda: audit(Cleaning(), EPISODE, [ReverseUnroll]), r"audit\(strategies=...\)"),
    ],
)
def test_a_class_in_an_argument_is_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^Expected `{message}` to be a "):
        build()


def test_a_schedule_without_steps_says_what_to_write() -> None:
    with pytest.raises(
        ValueError, match=r"Say when the next one takes over: `\[\(FirstOrder\(\), 100\), \(ReverseUnro"
    ):
        HypergradientSchedule([FirstOrder(), ReverseUnroll()])  # type: ignore[list-item]
