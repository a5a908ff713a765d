"""What the time is spent on: `where_time_goes.py`."""

from __future__ import annotations

from typing import Any

from tables import markdown, results
from tables.performance import verdict

NAME = "where_time_goes"
PLAIN = "the inner run alone"
STRATEGIES = ("FirstOrder()", "ReverseUnroll()", 'ReverseUnroll("sqrt")')


def tables() -> dict[str, str]:
    """Return the parts of the time by case, and the targets beside the arithmetic."""
    found = results(NAME)["results"]
    return {f"where_time_{name}": split(case) for name, case in found.items()} | {"where_time_targets": targets(found)}


def split(case: dict[str, Any]) -> str:
    """Return the milliseconds of each part, and the operations."""
    columns = [row.get("by kind") or row.get("by part") or {} for row in case.values()]
    parts = dict.fromkeys(part for column in columns for part in column)
    rows = [
        [part, *(f"{column[part]:.2f}" if part in column else "" for column in columns)]
        for part in parts
        if any(column.get(part, 0) >= 0.005 for column in columns)
    ]
    rows.append(["in all", *(f"{row['ms']:.2f}" for row in case.values())])
    if all("Mflop" in row for row in case.values()):
        rows.append(["millions of floating-point operations", *(f"{row['Mflop']:.0f}" for row in case.values())])
    return markdown(["ms", *case], rows)


def targets(found: dict[str, Any]) -> str:
    """Return ratios of time beside those of the operations."""
    directions, trainer, steps = found["directions"], found["trainer"], found["recomputation"]
    compared = [
        (
            f"a direction over the inner run, {norm}",
            2.2,
            directions[f"a direction, {norm}"],
            directions[f"{PLAIN}, {norm}"],
        )
        for norm in ("batch norm", "no norm")
    ]
    for net in ("perceptron", "CNN"):
        once, reverse, rooted = (steps[f"{name}, {net}"] for name in STRATEGIES)
        compared.append((f"`ReverseUnroll()` over the inner run, {net}", None, reverse, once))
        compared.append((f'`checkpoint="sqrt"` over none, {net}', 1.4, rooted, reverse))
    for text, name in (("a LightningModule", "in a LightningModule"), ("`BilevelModule`", "BilevelModule")):
        compared.append((f"{text} over the loop by hand", 1.05, trainer[name], trainer["by hand"]))
    rows = []
    for text, limit, more, less in compared:
        time = more["ms"] / less["ms"]
        operations = f"{more['Mflop'] / less['Mflop']:.2f}" if "Mflop" in more else ""
        met = verdict(time, limit) if limit else ""
        rows.append([text, f"≤ {limit:g}" if limit else "", f"{time:.2f}", met, operations])
    return markdown(["", "target", "time", "", "floating-point operations"], rows)
