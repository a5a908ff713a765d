"""`benchmarks/papers/data_cleaning_curves.py` and `benchmarks/peers/equal_quality.py`."""

from math import sqrt
from statistics import mean, median, stdev
from typing import Any

from tables import markdown, results

PROBLEMS = ("digits", "mnist")
LIBRARIES = ("by hand", "higher", "TorchOpt", "BOAT", "Betty")
LOSSES = (2.0, 1.75, 1.25)


def tables() -> dict[str, str]:
    """Return the table of the curves, those of equal quality, and that of the phases."""
    quality = results("equal_quality")["results"]
    made = {f"equal_quality_{name}": reached(quality[name]) for name in PROBLEMS if name in quality}
    for name in ("phases", "phases-mnist"):
        if name in quality:
            made[f"equal_quality_{name}".replace("-", "_")] = phases(quality[name])
    return {"data_cleaning_curves": curves(results("data_cleaning_curves")["results"]), **made}


def curves(methods: dict[str, Any]) -> str:
    rows = []
    for name, seeds in methods.items():
        runs = list(seeds.values())
        times = [time_to([first_below(run, loss) for run in runs]) for loss in LOSSES]
        steps = f"{mean(run['steps'][-1] for run in runs):,.0f}"
        last = spread([run["losses"][-1] for run in runs], 2)
        rows.append([f"`{name}`", steps, *times, last, spread([run["auroc"] for run in runs], 3)])
    heads = ("method-T-K", "outer steps", *(f"seconds to {loss:g}" for loss in LOSSES), "last loss", "AUROC")
    return markdown(heads, rows)


def first_below(run: dict[str, Any], loss: float) -> float | None:
    """Return the moment of the first of two looks in a row that were no higher than ``loss``."""
    looks = list(zip(run["seconds"], run["losses"], strict=True))
    pairs = zip(looks, looks[1:], strict=False)
    return next((one[0] for one, two in pairs if max(one[1], two[1]) <= loss), None)


def reached(methods: dict[str, Any]) -> str:
    """Return the methods by their median seconds; those that did not get there come last."""
    rows = []
    for name, seeds in in_all(methods).items():
        runs = list(seeds.values())
        fails = [run["fails"] for run in runs if "fails" in run]
        if fails:
            rows.append((float("inf"), [label(name), "", "", f"does not run: {fails[0]}"]))
            continue
        got = [run for run in runs if run["seconds"] is not None]
        order = sorted(run["seconds"] or float("inf") for run in runs)
        steps = f"{median(run['steps'] for run in got):.0f}" if got else ""
        times = time_to([run["seconds"] for run in runs], runs[0]["budget"])
        rows.append((order[len(order) // 2], [label(name), times, steps, f"{len(got)} of {len(runs)}"]))
    rows.sort(key=lambda row: row[0])
    return markdown(("method", "seconds", "outer steps", "seeds that got there"), [row for _, row in rows])


def in_all(methods: dict[str, Any]) -> dict[str, Any]:
    """Return the seeds that every method was run with."""
    seeds = set.intersection(*(set(runs) for runs in methods.values()))
    return {name: {seed: run for seed, run in runs.items() if seed in seeds} for name, runs in methods.items()}


def label(name: str) -> str:
    return name if name.startswith(LIBRARIES) else f"`{name}`"


def time_to(seconds: list[float | None], budget: float | None = None) -> str:
    """Return the median over seeds and, in brackets, the range; a seed that did not get there counts as latest."""
    order = sorted(float("inf") if value is None else value for value in seconds)
    middle = order[len(order) // 2]
    if middle == float("inf"):
        return f"> {budget:.0f}" if budget else "–"
    last = "–" if order[-1] == float("inf") else f"{order[-1]:.1f}"
    return f"{middle:.1f} ({order[0]:.1f} to {last})" if len(order) > 1 else f"{middle:.1f}"


def phases(names: dict[str, Any]) -> str:
    """Return what each phase alone and both lead to; nets are trained anew, for the accuracy, on the digits alone."""
    heads = ["", "outer steps", "validation loss", "AUROC", "cleaned %"]
    rows = []
    for name, seeds in names.items():
        runs = list(seeds.values())
        cells = [
            f"{mean(run['steps'] for run in runs):.0f}",
            spread([run["validation loss"] for run in runs], 3),
            spread([run["auroc"] for run in runs], 3),
        ]
        if "accuracy" in runs[0]:
            cells.append(spread([100 * run["accuracy"] for run in runs], 1))
        rows.append([name, *cells])
    return markdown(heads[: len(rows[0])], rows)


def spread(values: list[float], digits: int) -> str:
    """Return the mean and, of several, its standard error."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values) / sqrt(len(values)):.{digits}f}"
