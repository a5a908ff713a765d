"""`benchmarks/papers/learned_start.py`."""

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev

from tables import difference, markdown, results

OURS = "learned start and rate"
COMPARED = ("3", "10")
"""Steps after which differences are shown: those it was learned for, and more."""


def tables() -> dict[str, str]:
    """Return the table of all starts."""
    found = results("learned_start")["results"]
    runs = [run["psnr"] for run in found["reverse"].values()]
    ours = [run[OURS] for run in runs]
    rows = [row(f"**{OURS}**", ours)]
    if first_order := [run["psnr"][OURS] for run in found.get("first-order", {}).values()]:
        rows.append(row(f"{OURS}, `FirstOrder`", first_order))
    rows += [row(name, [run[name] for run in runs], ours) for name in runs[0] if name != OURS]
    heads = ("dB after ... steps", *ours[0], *(f"first row minus it, {steps}" for steps in COMPARED))
    return {"learned_start": markdown(heads, rows)}


def row(name: str, runs: list[dict[str, float]], ours: Sequence[dict[str, float]] = ()) -> list[str]:
    """Return means over seeds, with their standard errors, and the differences of what was learned to it."""
    values = [[run[steps] for run in runs] for steps in runs[0]]
    pairs = [([run[steps] for run in ours], [run[steps] for run in runs]) for steps in COMPARED]
    ahead = [difference(*pair) if ours else "" for pair in pairs]
    return [name, *(f"{mean(each):.1f} ± {stdev(each) / sqrt(len(each)):.1f}" for each in values), *ahead]
