"""What the time is spent on: `where_time_goes.py`."""

from __future__ import annotations

from typing import Any

from tables import markdown, results

NAME = "where_time_goes"
PLAIN = "the inner run alone"
STRATEGIES = ("FirstOrder()", "ReverseUnroll()", 'ReverseUnroll("sqrt")')


def tables() -> dict[str, str]:
    """Return the parts of the time by case, and ratios beside the arithmetic."""
    found = results(NAME)["results"]
    return {f"where_time_{name}": split(case) for name, case in found.items()} | {"where_time_ratios": ratios(found)}


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


def ratios(found: dict[str, Any]) -> str:
    """Return ratios of time beside those of the operations."""
    directions, trainer, steps = found["directions"], found["trainer"], found["recomputation"]
    compared = [
        (f"a direction over the inner run, {norm}", directions[f"a direction, {norm}"], directions[f"{PLAIN}, {norm}"])
        for norm in ("batch norm", "no norm")
    ]
    for net in ("perceptron", "CNN"):
        once, reverse, rooted = (steps[f"{name}, {net}"] for name in STRATEGIES)
        compared.append((f"`ReverseUnroll()` over the inner run, {net}", reverse, once))
        compared.append((f'`checkpoint="sqrt"` over none, {net}', rooted, reverse))
    for text, name in (("a LightningModule", "in a LightningModule"), ("`BilevelModule`", "BilevelModule")):
        compared.append((f"{text} over the loop by hand", trainer[name], trainer["by hand"]))
    rows = []
    for text, more, less in compared:
        operations = f"{more['Mflop'] / less['Mflop']:.2f}" if "Mflop" in more else ""
        rows.append([text, f"{more['ms'] / less['ms']:.2f}", operations])
    return markdown(["", "time", "floating-point operations"], rows)
