"""How far an outer level overfits, and what helps: `cleaning_baselines.py` and `outer_overfitting.py`."""

from __future__ import annotations

from typing import Any

from tables import cleaning_baselines, difference, interval, markdown, results

SETTING = "any 50%, 50"
HEADS = ("trusted %", "own net %", "gap", "weights alone %", "with trusted %", "minus a weight each")
KEYS = ("trusted accuracy", "own net", "weights alone")


def tables() -> dict[str, str]:
    """Return what each kind of outer level fits, and what it is worth."""
    return {"overfitting": kinds(), "overfitting_remedies": remedies()}


def kinds() -> str:
    """Return, for each kind of weights, accuracies on what the outer level sees and on test images."""
    runs = list(results("cleaning_baselines")["results"][SETTING].values())
    first, rows = [100 * run["accuracy"]["table"] for run in runs], []
    for name in cleaning_baselines.LEARNED:
        trusted, own, alone = ([100 * run["learned"][name][key] for run in runs] for key in KEYS)
        retrained = [100 * run["accuracy"][name] for run in runs]
        cells = [interval(trusted), interval(own), difference(trusted, own), interval(alone), interval(retrained)]
        rows.append([name, *cells, "" if name == "table" else difference(retrained, first)])
    return markdown(("what is learned", *HEADS), rows)


def remedies() -> str:
    """Return test accuracies after retraining, by remedy, and the difference to a run without any."""
    found: dict[str, Any] = results("outer_overfitting")["results"]
    rows = []
    for remedy in next(iter(found["table"].values())):
        cells = []
        for weights in ("table", "net"):
            seeds = found[weights].values()
            ours, none = ([100 * run[name]["with trusted"] for run in seeds] for name in (remedy, "none"))
            cells += [interval(ours), "" if remedy == "none" else difference(ours, none)]
        rows.append([remedy, *cells])
    heads = ("remedy", "a weight each, %", "minus none", "a net of loss and label, %", "minus none")
    return markdown(heads, rows)
