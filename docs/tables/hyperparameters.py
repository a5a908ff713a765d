"""`benchmarks/papers/hyperparameters.py` and `few_hyperparameters.py`."""

from math import sqrt
from statistics import mean, stdev
from typing import Any

from tables import difference, markdown, results

NAMES = {
    "grid": "grid",
    "reverse": "`ReverseUnroll`",
    "aid-fp": "AID-FP, `Neumann(10)`",
    "aid-cg": "AID-CG, `ConjugateGradient(10)`",
    "pzobo": "`PZOBO`",
    "hozog": "HOZOG, `ZerothOrder`",
    "forward": "`ForwardUnroll`",
}
FEW = {
    "default": "default",
    "warm": "`ReverseUnroll`, warm",
    "fresh": "`ReverseUnroll`, fresh",
    "random search": "random search",
    "TPE": "TPE",
}
LABELS = {
    "validation loss": "validation loss",
    "test loss": "test loss",
    "test accuracy": "test %",
    "refitted test loss": "refitted loss",
    "refitted test accuracy": "refitted %",
    "lr": "learning rate",
    "momentum": "momentum",
    "CPU seconds": "CPU s",
}
PENALTIES = (
    "validation loss",
    "test loss",
    "test accuracy",
    "refitted test loss",
    "refitted test accuracy",
    "CPU seconds",
)
RATES = ("lr", "momentum", "validation loss", "test loss", "test accuracy", "CPU seconds")


def tables() -> dict[str, str]:
    """Return a table for each task and each data set that was run."""
    made = {}
    for data, found in results("hyperparameters")["results"].items():
        seeds = list(found.values())
        made[f"hyperparameters_{data}"] = table(seeds, "penalties", PENALTIES, "refitted test loss")
        made[f"hyperparameters_{data}_rate"] = table(seeds, "learning rate", RATES, "test loss")
    return made | {"hyperparameters_few": few()}


def few() -> str:
    """Return what seven hyperparameters of a perceptron are worth that each method finds."""
    seeds = list(results("few_hyperparameters")["results"].values())
    rows = []
    for method in seeds[0]:
        keys = ("validation loss", "test loss", "test accuracy", "CPU seconds")
        cells = [cell(key, [seed[method][key] for seed in seeds]) for key in keys]
        against = [seed[method]["test loss"] for seed in seeds], [seed["fresh"]["test loss"] for seed in seeds]
        rows.append([FEW[method], *cells[:3], "" if method == "fresh" else difference(*against, 3), cells[3]])
    heads = (f"method, {len(seeds)} seeds", "validation loss", "test loss", "test %", "test loss minus fresh", "CPU s")
    return markdown(heads, rows)


def table(seeds: list[dict[str, Any]], task: str, keys: tuple[str, ...], judged: str) -> str:
    """Return a row for each method; the last column has its loss minus that of `ReverseUnroll`, seed by seed."""
    found = [{row["method"]: row for row in seed[task]} for seed in seeds]
    rows = []
    for method in found[0]:
        cells = [cell(key, [seed[method][key] for seed in found]) for key in keys]
        both = ([seed[name][judged] for seed in found] for name in (method, "reverse"))
        rows.append([NAMES.get(method, method), *cells, "" if method == "reverse" else difference(*both, 3)])
    labels = [LABELS[key] for key in keys]
    return markdown((f"method, {len(seeds)} seeds", *labels, f"{LABELS[judged]} minus `ReverseUnroll`"), rows)


def cell(key: str, values: list[float]) -> str:
    """Return the mean and, where it says something, its standard error."""
    if key == "CPU seconds":
        return f"{mean(values):.1f}"
    if "accuracy" in key:
        values = [100 * value for value in values]
    error = stdev(values) / sqrt(len(values))
    digits = 1 if "accuracy" in key else 3
    return f"{mean(values):.{digits}f} ± {error:.{digits}f}"
