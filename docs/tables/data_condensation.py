"""`benchmarks/papers/data_condensation.py`."""

from statistics import mean, stdev
from typing import Any

from tables import difference, interval, markdown, results

NAMES = {
    "truncated": "`TruncatedReverse(10)`",
    "hessian-free": "Hessian-free, `ImplicitGradient(Identity)`",
    "neumann": "`ImplicitGradient(Neumann(20))`",
    "forward": "(FG)²U, `ForwardGradient(32)`",
    "guided": "`ForwardGradient(32)`, guided by `TruncatedReverse(10)`",
    "two-phase": "two phases, `TruncatedReverse(10)`, then `ForwardGradient(32)`",
    "reverse": "`ReverseUnroll()`",
    "checkpointed": '`ReverseUnroll(checkpoint="sqrt")`',
}
PAPER = {"truncated": "73.8", "hessian-free": "66.0", "neumann": "68.4", "forward": "82.4", "reverse": "92.3"}
"""(FG)²U, table 1: MNIST, one image per class, test accuracy in percent."""

PAPER_MORE = {
    ("mnist-10", "truncated"): "94.1",
    ("mnist-10", "forward"): "96.1",
    ("mnist-10", "checkpointed"): "96.8",
    ("mnist-50", "truncated"): "96.6",
    ("mnist-50", "forward"): "97.0",
    ("mnist-50", "checkpointed"): "97.7",
}
BASELINES = {
    "start": "the real images of the start",
    "real images": "real images, other draws",
    "nearest real images": "the real images nearest to the class means",
    "k-means centres": "the class means",
    "whole training set": "whole training set",
}
CASES = {
    "mnist-10": "10",
    "mnist-50": "50",
}


def tables() -> dict[str, str]:
    """Return a table for each data set at one image per class, and those of the other sizes and of the two phases."""
    found = results("data_condensation")["results"]
    return {
        "condensation_digits": strategies(found["digits"], paper=False),
        "condensation_digits_steps": same_steps(found["digits-150"]),
        "condensation_mnist": strategies(found["mnist"], paper=True),
        "condensation_mnist_28": strategies(found["mnist-28"], paper=True),
        "condensation_more": sizes(found),
        "condensation_phases": phases(found),
        "condensation_centres": centres(found),
    }


def by_seed(seeds: dict[str, Any]) -> dict[str, list[float]]:
    """Return, for what was learned and for every baseline, the mean accuracy in percent of the nets of each seed."""
    runs = [{**run["baselines"], "learned": run["reverse"]["accuracy"]} for run in seeds.values()]
    return {name: [100 * mean(run[name]) for run in runs] for name in runs[0]}


def centres(found: dict[str, Any]) -> str:
    """Return what is learned from the centres on, beside sets that are not learned."""
    columns = {"one image per class": by_seed(found["digits-1"]), "ten": by_seed(found["digits-10"])}
    labels = {
        "learned": "**learned, from the centres on**",
        "k-means centres": "k-means centres, at one image the class means",
        "real images": "real images, drawn by chance",
    }
    rows = []
    for name in ("learned", "k-means centres", "nearest real images", "herding", "real images"):
        cells = []
        for runs in columns.values():
            ahead = "" if name == "learned" else difference(runs["learned"], runs[name])
            cells += [interval(runs[name]), ahead]
        rows.append([labels.get(name, name), *cells])
    heads = (head for name in columns for head in (f"{name}: test %", "learned − it"))
    return markdown((f"trained on, {len(found['digits-10'])} seeds", *heads), rows)


def strategies(seeds: dict[str, Any], paper: bool) -> str:
    """Return accuracies after the same seconds, and after the same outer steps."""
    runs = list(seeds.values())
    steps = sorted({int(step) for run in runs for name in NAMES if name in run for step in run[name]["accuracy after"]})
    heads = ["trained on", *(["paper"] if paper else []), "cosine", "outer steps", "same seconds"]
    heads += [f"{step} outer steps" for step in steps]
    rows = []
    for name, label in NAMES.items():
        mine = [run[name] for run in runs if name in run]
        if not mine:
            continue
        same = [[run["accuracy after"].get(str(step), []) for run in mine] for step in steps if name != "two-phase"]
        count = f"{mean(run['outer steps'] for run in mine):.0f}"
        accuracies = [cell([run["accuracy"] for run in mine]), *map(cell, same)]
        cosines = [value for run in runs for value in run.get("cosines", {}).get(name, [])]
        cosine = f"{mean(cosines):.2f}" if cosines else {"reverse": "1"}.get(name, "")
        rows.append([label, *([PAPER.get(name, "")] if paper else []), cosine, count, *accuracies])
    for name, label in BASELINES.items():
        accuracies = cell([run["baselines"][name] for run in runs])
        published = {"whole training set": "99.6"}.get(name, "")
        rows.append([label, *([published] if paper else []), "", "", accuracies])
    return markdown(heads, [row + [""] * (len(heads) - len(row)) for row in rows])


def same_steps(seeds: dict[str, Any]) -> str:
    """Return accuracies after the same outer steps, and the seconds that these took."""
    runs = list(seeds.values())
    rows = []
    for name, label in NAMES.items():
        mine = [run[name] for run in runs if name in run]
        if mine:
            between = [[run["accuracy after"][step] for run in mine] for step in mine[0]["accuracy after"]]
            accuracies = [cell(each) for each in (*between, [run["accuracy"] for run in mine])]
            rows.append([label, *accuracies, f"{mean(run['CPU seconds'] for run in mine):.0f}"])
    steps = [*runs[0]["reverse"]["accuracy after"], str(runs[0]["reverse"]["outer steps"])]
    return markdown(["trained on", *(f"{step} outer steps" for step in steps), "CPU seconds"], rows)


def sizes(found: dict[str, Any]) -> str:
    """Return what was run at other sizes of the condensed set."""
    rows = []
    for case, label in CASES.items():
        seeds = list(found[case].values())
        real = cell([run["baselines"]["start"] for run in seeds])
        for name in NAMES:
            mine = [run[name] for run in seeds if name in run]
            if mine:
                count = f"{mean(run['outer steps'] for run in mine):.0f}"
                ends = cell([run["accuracy"] for run in mine])
                few, after = next(iter(mine[0]["accuracy after"].items()), ("", []))
                few_steps = f"{cell([after])} ({few})" if few else ""
                rows.append([label, NAMES[name], PAPER_MORE[case, name], real, few_steps, count, ends])
        for name in ("k-means centres", "nearest real images", "herding"):
            rows.append([label, name, "", "", "", "", cell([run["baselines"][name] for run in seeds])])
    heads = ("images per class", "strategy", "paper", "start", "after as many steps", "outer steps", "same seconds")
    return markdown(heads, rows)


def phases(found: dict[str, Any]) -> str:
    """Return the two phases alone, and one after the other, in the same seconds."""
    kinds = {"truncated": "phase I only", "forward": "phase II only", "two-phase": "both, half of the seconds each"}
    # 150 steps of random directions are what fits into ten minutes.
    ten_minutes = {
        seed: {"forward": found["digits-150"][seed]["forward"], **runs} for seed, runs in found["digits-600"].items()
    }
    columns = {"digits, 35 s": found["digits"], "MNIST, 40 s": found["mnist"], "digits, 600 s": ten_minutes}
    rows = []
    for name, label in kinds.items():
        row = [label]
        for seeds in columns.values():
            mine = [run[name] for run in seeds.values()]
            row += [" + ".join(taken(name, seeds)), cell([run["accuracy"] for run in mine])]
        rows.append(row)
    return markdown(("", *(head for name in columns for head in (f"{name}: outer steps", "test %"))), rows)


def taken(name: str, seeds: dict[str, Any]) -> list[str]:
    """Return the outer steps of each phase."""
    steps = mean(run[name]["outer steps"] for run in seeds.values())
    if name != "two-phase":
        return [f"{steps:.0f}"]
    first = mean(run["truncated"]["outer steps"] // 2 for run in seeds.values())
    return [f"{first:.0f}", f"{steps - first:.0f}"]


def cell(runs: list[list[float]]) -> str:
    """Return mean and standard deviation over all nets of all runs, in percent; nothing if a run is not there."""
    if not all(runs):
        return ""
    values = [100 * value for run in runs for value in run]
    return f"{mean(values):.1f} ± {stdev(values):.1f}"
