"""`benchmarks/papers/pde_discovery.py`, beside the numbers of the paper."""

from statistics import mean, stdev
from typing import Any

from tables import markdown, results

NAMES = {"burgers": "Burgers", "allen-cahn": "Allen–Cahn", "kdv": "Korteweg–de Vries"}
# (FG)²U, arXiv 2406.14095, Figure 2 right: errors of ν in 1e-2 and of u in 1e-3, numerical solver.
PAPER = {"burgers": ("0.97 ± 0.45", "0.63 ± 0.33"), "allen-cahn": ("2.34 ± 0.64", "0.97 ± 0.54")}
PAPER["kdv"] = ("0.72 ± 0.57", "2.72 ± 1.55")
FOUND = 1e-5
"""A mean squared difference below this is a solution through the observations; local minima have 0.1 and more."""


def tables() -> dict[str, str]:
    """Return the tables of the errors, of a search beside them, of all starts of KdV, of the memory and of the net."""
    found = results("pde_discovery")["results"]
    made = {
        "pde_discovery": errors(found),
        "pde_discovery_search": searches(found),
        "pde_discovery_kdv": starts(found["kdv"]["rows"]),
        "pde_discovery_memory": memory(found["memory"]),
    }
    if "pinn" in found:
        made["pde_discovery_pinn"] = net(found["pinn"])
    return made


def errors(found: dict[str, Any]) -> str:
    heads = (
        "equation",
        "starts that find ν",
        "error of ν, 1e-2",
        "paper",
        "error of u, 1e-3",
        "paper",
        "CPU s",
        "solver",
    )
    rows = []
    for name, title in NAMES.items():
        every = found[name]["rows"]
        good = [row for row in every if row["loss"] < FOUND]
        nu, u = ([row[f"error of {which}"] for row in good] for which in ("nu", "u"))
        seconds = mean(row["CPU seconds"] for row in every)
        solver = f"{found['accuracy'][name]['error']:.0e}"
        cells = [f"{len(good)} of {len(every)}", spread(nu, 1e2), PAPER[name][0], spread(u, 1e3), PAPER[name][1]]
        rows.append([title, *cells, f"{seconds:.1f}", solver])
    return markdown(heads, rows)


def spread(values: list[float], unit: float) -> str:
    """Return mean ± standard deviation, as the paper has them."""
    return f"{unit * mean(values):.3f} ± {unit * stdev(values):.3f}"


def searches(found: dict[str, Any]) -> str:
    """Return what finds ν without a hypergradient beside the runs above, of those starts that find it."""
    heads = ("equation", "method", "starts that find ν", "solutions", "error of ν")
    rows = []
    for name, title in NAMES.items():
        ways = {
            "`ZerothOrder`": [{"solutions": 2 * row["steps"], **row} for row in found[name]["rows"]],
            "Adam on central differences": found["differences"][name],
            "grid and Brent's method": [found["search"][name]],
        }
        for way, every in ways.items():
            good = [row for row in every if row["loss"] < FOUND]
            share = "no start" if way.startswith("grid") else f"{len(good)} of {len(every)}"
            error = mean(row["error of nu"] for row in good)
            rows.append([title, way, share, str(good[0]["solutions"]), f"{error:.0e}"])
    return markdown(heads, rows)


def starts(rows: list[dict[str, Any]]) -> str:
    heads = ("start", "found ν", "error of ν", "loss at the end")
    ordered = sorted(rows, key=lambda row: row["start"])
    return markdown(
        heads,
        [
            [*(f"{row[key]:.5f}" for key in ("start", "nu")), *(f"{row[key]:.1e}" for key in ("error of nu", "loss"))]
            for row in ordered
        ],
    )


def memory(rows: list[dict[str, Any]]) -> str:
    heads = ("strategy", "inner steps", "before, MiB", "peak, MiB", "added, MiB")
    names = {"forward": "`ForwardGradient(1)`", "reverse": "`ReverseUnroll()`"}
    lines = []
    for row in rows:
        before, peak = row["before (MiB)"], row["peak (MiB)"]
        lines.append(
            [names[row["strategy"]], str(row["inner steps"]), f"{before:.0f}", f"{peak:.0f}", f"{peak - before:.0f}"]
        )
    return markdown(heads, lines)


def net(found: dict[str, Any]) -> str:
    row, curve = found["rows"][0], found["curves"][0]
    heads = ("start", "closest ν on the way", "ν at the end", "error of ν", "error of u", "CPU s", "peak MiB")
    closest = min(curve, key=lambda nu: abs(nu / 0.0031831 - 1))
    cells = [f"{row['start']:.3f}", f"{closest:.4f}", f"{row['nu']:.4f}", f"{row['error of nu']:.2f}"]
    cells += [f"{row['error of u']:.3f}", f"{row['CPU seconds']:.0f}", f"{row['peak memory (MiB)']:.0f}"]
    return markdown(heads, [cells])
