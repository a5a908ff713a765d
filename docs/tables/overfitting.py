"""How far an outer level overfits, and what helps: `benchmarks/papers/cleaning_baselines.py`."""

from __future__ import annotations

from tables import cleaning_baselines, difference, interval, markdown, results

SETTING = "any 50%, 50"
HEADS = ("trusted %", "own net %", "gap", "weights alone %", "with trusted %")
KEYS = ("trusted accuracy", "own net", "weights alone")


def tables() -> dict[str, str]:
    """Return what each kind of outer level fits, and what it is worth."""
    return {"overfitting": kinds()}


def kinds() -> str:
    """Return, for each kind of weights, accuracies on what the outer level sees and on test images."""
    runs = list(results("cleaning_baselines")["results"][SETTING].values())
    rows = []
    for name in cleaning_baselines.LEARNED:
        trusted, own, alone = ([100 * run["learned"][name][key] for run in runs] for key in KEYS)
        retrained = [100 * run["accuracy"][name] for run in runs]
        cells = [interval(trusted), interval(own), difference(trusted, own), interval(alone), interval(retrained)]
        rows.append([name, *cells])
    return markdown(("what is learned", *HEADS), rows)
