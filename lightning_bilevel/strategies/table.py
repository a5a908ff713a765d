"""The facts about every hypergradient strategy, as the classes state them."""

from __future__ import annotations

from typing import NamedTuple

from lightning_bilevel.strategies.base import every_strategy


class Facts(NamedTuple):
    """One row of the table; see the attributes of :class:`HypergradientStrategy`."""

    name: str
    exact: bool
    unbiased: bool
    differentiates: frozenset[str]
    needs_steps: bool
    direction_parallel: bool
    memory: str
    cost: str


def facts() -> list[Facts]:
    """Return one row per strategy of this package, by name.

    >>> [row.name for row in facts() if row.exact]
    ['ForwardUnroll', 'ReverseUnroll']
    """
    return [Facts(cls.__name__, *(getattr(cls, field) for field in Facts._fields[1:])) for cls in every_strategy()]


def markdown() -> str:
    """Return the table in Markdown, for the documentation.

    >>> print(markdown().splitlines()[0])
    | strategy | exact | unbiased | differentiates | needs steps | direction parallel | memory | cost |
    """
    heads = ["strategy", *(field.replace("_", " ") for field in Facts._fields[1:])]
    rows = [[f"`{row.name}`", *(_cell(value) for value in row[1:])] for row in facts()]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: bool | str | frozenset[str]) -> str:
    if isinstance(value, frozenset):
        return " and ".join(f"the {each.replace('_', ' ')}" for each in sorted(value, reverse=True)) or "nothing"
    return value if isinstance(value, str) else "yes" if value else "no"
