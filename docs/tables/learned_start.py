"""`benchmarks/papers/learned_start.py`."""

from math import sqrt
from statistics import mean, stdev
from typing import Any

from tables import markdown, results

OURS = "learned start and rate"


def tables() -> dict[str, str]:
    """Return the table of all starts."""
    found = results("learned_start")["results"]
    runs = list(found["reverse"].values())
    columns = list(runs[0]["psnr"][OURS])
    rows = [row(f"**{OURS}**", [run["psnr"][OURS] for run in runs], columns)]
    if first_order := list(found.get("first-order", {}).values()):
        rows.append(row(f"{OURS}, `FirstOrder`", [run["psnr"][OURS] for run in first_order], columns))
    rows += [row(name, [run["psnr"][name] for run in runs], columns) for name in runs[0]["psnr"] if name != OURS]
    return {"learned_start": markdown(("dB after ... steps", *columns), rows)}


def row(name: str, runs: list[dict[str, Any]], columns: list[str]) -> list[str]:
    """Return means over seeds, with their standard errors."""
    values = [[run[column] for run in runs] for column in columns]
    return [name, *(f"{mean(each):.1f} ± {stdev(each) / sqrt(len(each)):.1f}" for each in values)]
