"""The facts about every hypergradient strategy, as the classes state them."""

from __future__ import annotations

from typing import NamedTuple

from lightning_bilevel.linear_solvers import Neumann
from lightning_bilevel.strategies.base import HypergradientStrategy, every_strategy
from lightning_bilevel.strategies.bome import BOME
from lightning_bilevel.strategies.darts import DARTS
from lightning_bilevel.strategies.evograd import EvoGrad
from lightning_bilevel.strategies.first_order import FirstOrder
from lightning_bilevel.strategies.forward_gradient import ForwardGradient
from lightning_bilevel.strategies.forward_unroll import ForwardUnroll
from lightning_bilevel.strategies.fsla import FSLA
from lightning_bilevel.strategies.gamma_greedy import GammaGreedy
from lightning_bilevel.strategies.implicit_gradient import ImplicitGradient
from lightning_bilevel.strategies.meha import MEHA
from lightning_bilevel.strategies.penalty_gradient import PenaltyGradient
from lightning_bilevel.strategies.pes import PES
from lightning_bilevel.strategies.pzobo import PZOBO
from lightning_bilevel.strategies.reverse_unroll import ReverseUnroll
from lightning_bilevel.strategies.soba import SOBA
from lightning_bilevel.strategies.truncated_reverse import TruncatedReverse
from lightning_bilevel.strategies.zeroth_order import ZerothOrder


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


def one_of_each() -> list[HypergradientStrategy]:
    """Return every strategy that estimates by itself, with little to do, and both engines of forward gradients.

    >>> missing = {kind.__name__ for kind in every_strategy()} - {type(each).__name__ for each in one_of_each()}
    >>> missing
    {'HypergradientSchedule'}
    """
    return [
        ReverseUnroll(),
        TruncatedReverse(),
        FirstOrder(),
        ForwardUnroll(),
        ForwardGradient(),
        ForwardGradient(mode="forward"),
        ImplicitGradient(Neumann(terms=2, step_size=1e-2)),
        PenaltyGradient(),
        GammaGreedy(),
        FSLA(),
        SOBA(),
        BOME(),
        DARTS(),
        EvoGrad(),
        MEHA(),
        PZOBO(2),  # two runs at once: one alone is not vectorized
        ZerothOrder(2),
        PES(),
    ]


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
