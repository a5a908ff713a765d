"""`benchmarks/benchopt/run_benchopt.py`: what each solver has reached after so many seconds."""

from __future__ import annotations

import re
from math import exp, log
from typing import Any

from tables import markdown, results

OURS = "lightning_bilevel, "
ROWS = {
    "implicit": "`ImplicitGradient`, Newton",
    "soba": '`SOBA(momentum="recursive")`',
    "amigo": "`ImplicitGradient(warm_start=True)`",
    "penalty": "`PenaltyGradient`",
}
SHARES = (0.03, 0.1, 0.3, 1.0)
"""Of the seconds of a run: where the curves are read."""


def tables() -> dict[str, str]:
    """Return one table a problem, and one of the best of ours and of theirs."""
    problems = results("benchopt")["results"]
    return {"benchopt": best(problems)} | {f"benchopt_{name}": whole(found) for name, found in problems.items()}


def whole(found: dict[str, Any]) -> str:
    """Return a row for each solver, those first that end lower."""
    solvers = sorted(found["solvers"].items(), key=lambda pair: reached(pair[1], found["seconds"]))
    rows = [
        [named(label), f"{step_milliseconds(solver):.3g}", *(shown(reached(solver, s), found) for s in moments(found))]
        for label, solver in solvers
    ]
    return markdown(["", "ms a step", *(f"{second:g} s" for second in moments(found))], rows)


def best(problems: dict[str, Any]) -> str:
    """Return two rows for each problem."""
    rows = []
    for name, found in problems.items():
        for ours in (True, False):
            solvers = {label: each for label, each in found["solvers"].items() if label.startswith(OURS) == ours}
            label = min(solvers, key=lambda label: reached(solvers[label], found["seconds"]))
            values = (min(reached(each, second) for each in solvers.values()) for second in moments(found))
            times = ", ".join(f"{second:g}" for second in moments(found))
            who = f"{'ours' if ours else 'theirs'}, {named(label).removeprefix('ours, ')}"
            rows.append([f"{name}, {times} s" if ours else "", who, *(shown(value, found) for value in values)])
    return markdown(["problem, and the seconds of the columns", "last in the lead", *("" for _ in SHARES)], rows)


def named(label: str) -> str:
    return f"ours, {ROWS[label.removeprefix(OURS)]}" if label.startswith(OURS) else label


def moments(found: dict[str, Any]) -> list[float]:
    return [share * found["seconds"] for share in SHARES]


def reached(solver: dict[str, Any], second: float) -> float:
    """Return where the curve is then, as the plot has it: straight between its points, logarithmically."""
    points = [pair for pair in zip(solver["curve"]["seconds"], solver["curve"]["value"], strict=True) if min(pair) > 0]
    before = [pair for pair in points if pair[0] <= second] or points[:1]
    after = [pair for pair in points if pair[0] > second] or points[-1:]
    (a, low), (b, high) = before[-1], after[0]
    share = log(second / a) / log(b / a) if a < second < b else float(second >= b)
    return exp(log(low) + share * (log(high) - log(low)))


def step_milliseconds(solver: dict[str, Any]) -> float:
    """Return the CPU time of an outer step: ``eval_freq`` of them are between two calls, else one."""
    curve, given = solver["curve"], re.search(r"eval_freq=(\d+)", solver["solver"])
    return 1000 * curve["seconds"][-1] / (curve["calls"][-1] * int(given[1] if given else 1))


def shown(value: float, found: dict[str, Any]) -> str:
    return f"{value:.1%}" if "share" in found["measure"] else f"{value:.0e}"
