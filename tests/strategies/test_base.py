"""Every strategy is public, in the table of the tests, and states its facts."""

from __future__ import annotations

import lightning_bilevel
from lightning_bilevel import HypergradientStrategy, strategies
from tests.support.tables import ROWS, Row, every_strategy


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
