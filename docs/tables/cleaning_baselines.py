"""`benchmarks/papers/cleaning_baselines.py`."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from tables import difference, half_width, interval, markdown, results

LEARNED = ("table", "table, trusted inside", "net", "net, trusted inside", "matrix, trusted inside")
CEILING = "right labels"

Runs = Mapping[str, Sequence[float]]
"""From a method to its test accuracies in percent, one for each seed."""


def tables() -> dict[str, str]:
    """Return the accuracies of all methods, and how far what is learned is ahead of the strongest baseline."""
    found = {name: accuracies(seeds) for name, seeds in results("cleaning_baselines")["results"].items()}
    return {"cleaning_baselines": methods(found), "cleaning_ahead": ahead(found)}


def accuracies(seeds: Mapping[str, Any]) -> Runs:
    """Return the test accuracies of every method, in percent."""
    runs = [run["accuracy"] for run in seeds.values()]
    return {method: [100 * run[method] for run in runs] for method in runs[0]}


def strongest(runs: Runs) -> str:
    """Return the baseline of the largest mean."""
    return max((method for method in runs if method not in (*LEARNED, CEILING)), key=lambda method: mean(runs[method]))


def beaten(runs: Runs, ours: str) -> list[str]:
    """Return the baselines that are worse than what is learned by more than the interval of the paired difference."""
    found = []
    for method in runs:
        pairs = [a - b for a, b in zip(runs[ours], runs[method], strict=True)]
        if method not in (*LEARNED, CEILING) and mean(pairs) > half_width(pairs):
            found.append(method)
    return found


def methods(found: Mapping[str, Runs]) -> str:
    rows = []
    for method in next(iter(found.values())):
        name = f"**{method}**" if method in LEARNED else method
        rows.append([name, *(interval(runs[method]) for runs in found.values())])
    return markdown(("wrong labels, trusted examples", *heads(found)), rows)


def heads(found: Mapping[str, Runs]) -> list[str]:
    """Return the settings, with the number of seeds of each."""
    return [f"{name} ({len(runs[CEILING])} seeds)" for name, runs in found.items()]


def ahead(found: Mapping[str, Runs]) -> str:
    rows = []
    for ours in LEARNED:
        cells = []
        for runs in found.values():
            count = len(beaten(runs, ours))
            mark = "**" if count == len(runs) - len(LEARNED) - 1 else ""
            cells.append(f"{mark}{difference(runs[ours], runs[strongest(runs)])}{mark} ({count})")
        rows.append([ours, *cells])
    rows.append(["the strongest baseline", *map(strongest, found.values())])
    return markdown(("minus the strongest baseline", *heads(found)), rows)
