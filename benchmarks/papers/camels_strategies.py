"""What do the weights of CaMeLS learn with each hypergradient strategy and depth, and is the model better for it?

Synthetic documents, small language model. For every seed one language model is trained; each strategy then trains
weights for it, and the model adapts to the same stream of 64 unseen documents. Some go on from the weights of reverse
unrolling at depth 6, as the second phase of (FG)²U's recipe does, and all of these for as many outer steps; the others
start uniform. Runs that are finished are not repeated, and one that was cut off goes on.

    python benchmarks/papers/camels_strategies.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.intervals import interval
from support.results import save

import camels

FIRST = "reverse 6"
"""Whose language model and weights the others take."""


class Case(NamedTuple):
    """Options of a run, whether it goes on from the weights of the first, and for how many seeds it was run.

    Every ``monitor`` outer steps the hypergradient is compared with the exact one.
    """

    strategy: str
    depth: int
    steps: int
    goes_on: bool = False
    seeds: int = 3
    outer_lr: float | None = None
    monitor: int = 3


CASES = {
    FIRST: Case("reverse", 6, 200, seeds=4, monitor=0),
    "two-phase 24": Case("two-phase", 24, 212, monitor=0),
    "forward 24": Case("forward", 24, 12, goes_on=True),
    "forward 48": Case("forward", 48, 12, goes_on=True, monitor=0),
    "guided 24": Case("guided", 24, 12, goes_on=True),
    "checkpointed 24": Case("checkpointed", 24, 12, goes_on=True, monitor=0),
    "truncated 24": Case("truncated", 24, 12, goes_on=True),
    "checkpointed 48": Case("checkpointed", 48, 12, goes_on=True, monitor=0),
    "reverse 4": Case("reverse", 4, 200, monitor=0),
    "reverse 2": Case("reverse", 2, 200, monitor=0),
    "reverse 1": Case("reverse", 1, 200, monitor=0),
    "pzobo 6": Case("pzobo", 6, 40, monitor=8),
    "identity 6": Case("identity", 6, 60, monitor=6),
    "identity 6, lower rate": Case("identity", 6, 60, outer_lr=1e-4, monitor=6),
}

SECOND_RATE = 0.25 * 5e-4
"""The outer learning rate of the second phase begins where that of the first ended."""


def run(name: str, seed: int, output: Path) -> dict[str, Any]:
    """Return the results of one run; what is finished is read, what was cut off goes on."""
    folder, first = (output / f"{seed}" / each.replace(",", "").replace(" ", "-") for each in (name, FIRST))
    path = folder / "camels.json"
    if not path.exists():
        case = CASES[name]
        options = ["--quiet", "--resume", "--seed", str(seed), "--output", str(folder)]
        options += ["--strategy", case.strategy, "--depth", str(case.depth), "--steps", str(case.steps)]
        options += ["--monitor", str(case.monitor)]
        if name != FIRST:
            options += ["--base", str(first / "camels" / "lm"), "--tune-steps", "0", "--weightings", "learned"]
        rate = SECOND_RATE if case.goes_on else case.outer_lr
        if case.goes_on:
            options += ["--weights", str(first / "camels" / "weights.pt")]
        if rate:
            options += ["--outer-lr", str(rate)]
        folder.mkdir(parents=True, exist_ok=True)
        camels.main(options)
    return json.loads(path.read_text())


def summary(rows: Sequence[dict[str, Any]], weighting: str) -> dict[str, Any]:
    """Return the scores of one way of weighting over seeds."""
    scores = [row["adaptation"][weighting] for row in rows]
    before = [row["adaptation"]["no adaptation"]["answer_nll"] for row in rows]
    found = {name: interval([score[name] for score in scores]) for name in ("answer_nll", "exact_match", "f1")}
    found["gain"] = interval([old - score["answer_nll"] for old, score in zip(before, scores, strict=True)])
    found["lr"] = [score["lr"] for score in scores]
    return found


def comparison(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the scores of all ways of weighting over seeds, and by how much the learned weights are better."""
    found: dict[str, Any] = {name: summary(rows, name) for name in rows[0]["adaptation"]}
    learned = found["learned"]["answer_nll"]["values"]
    for name in [name for name in rows[0]["adaptation"] if name not in ("no adaptation", "learned")]:
        others = found[name]["answer_nll"]["values"]
        found[f"learned over {name}"] = interval([other - own for other, own in zip(others, learned, strict=True)])
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--seeds", type=int, default=max(case.seeds for case in CASES.values()), help="at most")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--output", type=Path, default=Path("outputs/camels_strategies"), help="folder of the runs")
    args = script.begin(parser, argv)

    results: dict[str, Any] = {}
    for name in dict.fromkeys([FIRST, *args.cases]):
        rows = [run(name, seed, args.output) for seed in range(min(CASES[name].seeds, args.seeds))]
        results[name] = {
            **CASES[name]._asdict(),
            "seeds": len(rows),
            "auroc": interval([row["auroc"] for row in rows]),
            "weight of facts": interval([row["mean weight"]["facts"] for row in rows]),
            "weight of other tokens": interval([row["mean weight"]["other tokens"] for row in rows]),
            "learned": summary(rows, "learned"),
            "cosine": [row["cosine"] for row in rows],
        }
        if name == FIRST:
            results[name] |= comparison(rows)
            firsts = [row["adaptation"]["learned"]["answer_nll"] for row in rows]
        else:
            nlls = results[name]["learned"]["answer_nll"]["values"]
            results[name]["over the first"] = interval([old - new for old, new in zip(firsts, nlls, strict=False)])
        save("camels_strategies", {"seeds": args.seeds, "transformers": version("transformers")}, results)
    return results


if __name__ == "__main__":
    main()
