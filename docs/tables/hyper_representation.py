"""`benchmarks/papers/hyper_representation.py`."""

from math import sqrt
from statistics import mean, stdev
from typing import Any

from tables import difference, markdown, results

NAMES = {
    "reverse": "`ReverseUnroll`",
    "aid-fp": "AID-FP, `Neumann(N)`",
    "aid-cg": "AID-CG, `ConjugateGradient(N)`",
    "stocbio": "as in stocBiO, `Neumann(3)`",
    "pzobo": "`PZOBO`, as its equations stand",
    "pzobo-unit": "`PZOBO`, directions of length 1",
    "hozog": "HOZOG, `ZerothOrder`",
    "first-order": "`FirstOrder`: head held fixed",
    "ridge": "ridge regression on the inputs",
    "jointly": "body and head together, Adam, as many seconds",
}
SHALLOW = {
    "outer_loss": "outer loss",
    "test_loss": "test loss",
    "exact_loss": "with the exact head",
    "cosine": "cosine",
    "milliseconds": "ms a step",
    "seconds_to_mark": "s to 1%",
}
DEEP = {
    "outer_loss": "outer loss",
    "test_accuracy": "test %",
    "cosine": "cosine",
    "milliseconds": "ms a step",
    "seconds_to_mark": "s to 85%",
}
INNER = {"outer_loss": "outer loss", "test_accuracy": "test %", "milliseconds": "ms a step", "seconds_to_mark": "s"}
KINDS = {"linear": "linear", "two-layer": "two layers", "digits": "LeNet, digits"}


def tables() -> dict[str, str]:
    """Return a table for each case that was run, and one for the numbers of inner steps."""
    rows = results("hyper_representation")["results"]
    made = {}
    cases = {"linear": (SHALLOW, 1, 3), "two-layer": (SHALLOW, 1, 1), "digits": (DEEP, 100, 1), "mnist": (DEEP, 100, 1)}
    for case, style in cases.items():
        mine = [row for row in rows if row["case"] == case]
        if mine:
            made[f"hyper_representation_{case.replace('-', '_')}"] = table(mine, *style)
    made["hyper_representation_inner_steps"] = inner_steps(rows)
    return made


def table(rows: list[dict[str, Any]], labels: dict[str, str], scale: float, digits: int) -> str:
    """Return a line for each strategy, with its score minus that of `ReverseUnroll`, seed by seed.

    Where one has fewer seeds than the others, it says so. The score, times ``scale`` and with so many ``digits``, is
    what the second column has.
    """
    judged = list(labels)[1]
    lines = []
    seeds = {row["seed"] for row in rows}
    exact = {row["seed"]: scale * row[judged] for row in rows if row["strategy"] == "reverse"}
    for strategy, name in NAMES.items():
        runs = [row for row in rows if row["strategy"] == strategy]
        if runs:
            fewer = f" ({len(runs)} of {len(seeds)} seeds)" if len(runs) < len(seeds) else ""
            pairs = [scale * row[judged] for row in runs], [exact[row["seed"]] for row in runs]
            against = "" if strategy == "reverse" else difference(*pairs, digits)
            lines.append([name + fewer, *(cell(key, runs) for key in labels), against])
    heads = (f"strategy, {len(seeds)} seeds", *labels.values(), f"{labels[judged]} minus `ReverseUnroll`")
    return markdown(heads, lines)


def inner_steps(rows: list[dict[str, Any]]) -> str:
    lines = []
    for case, kind in KINDS.items():
        mine = [row for row in rows if row["case"] == f"{case}, N"]
        for count in sorted({row["inner_steps"] for row in mine}):
            runs = [row for row in mine if row["inner_steps"] == count]
            lines.append([f"{kind}, N = {count}", *(cell(key, runs) if key in runs[0] else "" for key in INNER)])
    return markdown(("", *INNER.values()), lines)


def cell(key: str, runs: list[dict[str, Any]]) -> str:
    """Return a mean and, where it says something, its standard error; a mark counts if all runs reached it."""
    if key not in runs[0]:
        return ""
    values = [run[key] for run in runs]
    if key == "seconds_to_mark":
        missed = values.count(None)
        if missed:
            return "never" if missed == len(values) else f"{len(values) - missed} of {len(values)} runs"
        return f"{mean(values):.2g}" if mean(values) < 10 else f"{mean(values):.0f}"
    if key == "cosine":
        return f"{mean(values):.2f}"
    if key == "milliseconds":
        return f"{mean(values):.1f}" if mean(values) < 10 else f"{mean(values):.0f}"
    if key == "test_accuracy":
        return spread([100 * value for value in values], ".1f", ".1f")
    return spread(values, ".2g", ".1g")


def spread(values: list[float], digits: str, error_digits: str) -> str:
    """Return the mean, with its standard error where there are several values."""
    if len(values) == 1:
        return f"{values[0]:{digits}}"
    return f"{mean(values):{digits}} ± {stdev(values) / sqrt(len(values)):{error_digits}}"
