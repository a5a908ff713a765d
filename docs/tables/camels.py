"""`benchmarks/camels_strategies.py` and `camels_depth.py`."""

from statistics import fmean
from typing import Any

from tables import markdown, results

SCORES = ("answer NLL", "gain", "EM %", "F1 %")


def tables() -> dict[str, str]:
    """Return the tables of the page on CaMeLS."""
    return {
        "camels_adaptation": adaptation(),
        "camels_strategies": strategies(),
        "camels_depth": depth(),
    }


def adaptation() -> str:
    """Compare ways of weighting, over seeds."""
    found = results("camels_strategies")["results"]["reverse 6"]
    rows = []
    for name in ("no adaptation", "uniform", "learned", "oracle"):
        scores = found[name]
        numbers = [number(scores["answer_nll"], 3), "" if name == "no adaptation" else number(scores["gain"], 3)]
        rows.append([name, *numbers, number(scores["exact_match"], 1), number(scores["f1"], 1)])
    return markdown(("weights", *SCORES), rows)


def strategies() -> str:
    """Compare strategies and depths on the seeds that all of them have."""
    found = results("camels_strategies")["results"]
    common = min(row["seeds"] for row in found.values())

    def over_seeds(value: dict[str, Any], digits: int) -> str:
        return f"{fmean(value['values'][:common]):.{digits}f}"

    rows = []
    for row in found.values():
        name = f"`{row['strategy']}`, {row['depth']}" + (", goes on" if row["goes_on"] else "")
        learned = [over_seeds(row["learned"][score], digits) for score, digits in (("gain", 3), ("f1", 1))]
        weights = [over_seeds(row[f"weight of {what}"], 2) for what in ("facts", "other tokens")]
        rows.append([name, str(row["steps"]), over_seeds(row["auroc"], 3), *weights, *learned])
    heads = ("strategy, documents", "outer steps", "AUROC", "weight of facts", "of others", "gain", "F1 %")
    return markdown(heads, rows)


def depth() -> str:
    """Memory of one hypergradient, a row for each strategy and a column for each depth."""
    found = {(row["strategy"], row["depth"]): f"{row['peak MiB']:.0f}" for row in results("camels_depth")["results"]}
    depths = sorted({number for _, number in found})
    names = dict.fromkeys(name for name, _ in found)
    rows = [[f"`{name}`", *(found.get((name, number), "") for number in depths)] for name in names]
    return markdown(("peak MiB, by documents", *map(str, depths)), rows)


def number(value: dict[str, Any], digits: int) -> str:
    """Return a mean with half the width of its interval."""
    half = "" if value["half_width"] is None else f" ± {value['half_width']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{half}"
