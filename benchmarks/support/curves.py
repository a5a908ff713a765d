"""The strategies whose cost is compared, and their curves: seconds and MiB over the size of a problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from matplotlib.ticker import LogLocator, NullFormatter

import report
from lightning_bilevel import (
    PZOBO,
    FirstOrder,
    ForwardGradient,
    ForwardUnroll,
    GammaGreedy,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
)
from lightning_bilevel.linear_solvers import ConjugateGradient
from support.results import ORANGE, PURPLE, SKY, earlier, keep, plot

PLAIN = "the inner run alone"
WHAT = ("MiB", "seconds")
"""What is measured, in this order: memory is best measured before anything is timed."""

Row = dict[str, dict[str, float]]
"""By strategy, "seconds" and "MiB"."""


class Contender(NamedTuple):
    """A strategy and the look of its curve."""

    make: Callable[[], HypergradientStrategy]
    color: str
    dashes: Any = "-"


STRATEGIES = {
    "ReverseUnroll()": Contender(ReverseUnroll, report.BLUE),
    'ReverseUnroll("sqrt")': Contender(lambda: ReverseUnroll("sqrt"), report.BLUE, "--"),
    "TruncatedReverse(10)": Contender(lambda: TruncatedReverse(10), SKY),
    "ForwardUnroll()": Contender(ForwardUnroll, ORANGE),
    "ForwardGradient(4)": Contender(lambda: ForwardGradient(4), report.VERMILION),
    "ForwardGradient(4), guided": Contender(
        lambda: ForwardGradient(4, guide=TruncatedReverse(1)), report.VERMILION, "--"
    ),
    "ImplicitGradient()": Contender(lambda: ImplicitGradient(ConjugateGradient(10)), report.GREEN),
    "GammaGreedy()": Contender(GammaGreedy, report.GREEN, "--"),
    "FirstOrder()": Contender(FirstOrder, "#000000", ":"),
    "PZOBO(4)": Contender(lambda: PZOBO(4), PURPLE),
    "ZerothOrder(4)": Contender(lambda: ZerothOrder(4), PURPLE, "--"),
}
"""The guide is one-step truncation; the implicit gradient takes up to 10 steps of conjugate gradients."""


def kept(name: str, size: int, quantity: str, values: Mapping[str, float], settings: dict[str, Any]) -> dict[int, Row]:
    """Put "seconds" or "MiB" of one size into ``results/NAME.json``, beside what is there; return all rows by size."""
    rows = earlier(name)
    row = rows.get(str(size), {})
    for contender in [PLAIN, *STRATEGIES]:
        if contender in values:
            row.setdefault(contender, {})[quantity] = values[contender]
            print(f"{size:8d} {contender:30s} {values[contender]:9.4f} {quantity}", flush=True)
    rows = keep(name, settings, row, str(size), order=sorted({*rows, str(size)}, key=int))
    return {int(key): found for key, found in rows.items()}


def draw(name: str, xlabel: str, base: float, rows: Mapping[int, Row]) -> None:
    """Draw ``results/NAME.png``."""
    with plot(name, 1, 2, size=(11, 3.9)) as (figure, panels):
        looks = {**{name: each[1:] for name, each in STRATEGIES.items()}, PLAIN: (report.GREY, "-")}
        for axes, quantity, title in zip(panels, ("seconds", "MiB"), ("Time", "Peak memory"), strict=True):
            for strategy, (color, dashes) in looks.items():
                points = [
                    (size, row[strategy][quantity]) for size, row in rows.items() if quantity in row.get(strategy, {})
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), color=color, ls=dashes, marker="o", ms=3, label=strategy)
            axes.set(xlabel=xlabel, yscale="log", title=f"{title} of one estimate")
            axes.set_xscale("log", base=base)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        panels[0].set_ylabel("CPU seconds")
        panels[1].set_ylabel("MiB")
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8.5, handlelength=2.8
        )
