"""The table of facts has every strategy."""

from __future__ import annotations

from lightning_bilevel import strategies
from lightning_bilevel.strategies.table import Facts, facts, markdown


def test_every_strategy_is_in_the_table_once_with_all_facts() -> None:
    public = set(strategies.__all__) - {"HypergradientStrategy"}
    rows = facts()
    assert sorted(public) == [row.name for row in rows]
    for row in rows:
        kind = getattr(strategies, row.name)
        assert row[1:] == tuple(getattr(kind, field) for field in Facts._fields[1:])
        assert [type(value) for value in row] == [str, bool, bool, frozenset, bool, bool, str, str]
        assert "" not in row


def test_the_table_in_markdown() -> None:
    lines = markdown().splitlines()
    assert len(lines) == len(facts()) + 2
    assert {line.count("|") for line in lines} == {len(Facts._fields) + 1}
    (line,) = (line for line in lines if line.startswith("| `PZOBO` |"))
    assert line == "| `PZOBO` | no | no | nothing | no | yes | O(M · chunk) | Q + 1 inner runs |"
