"""What do the weights of CaMeLS learn with each hypergradient strategy and depth, and is the model better for it?

Synthetic documents, small language model. For every seed one language model is trained; each strategy then trains
weights for it, and the model adapts to the same stream of 64 unseen documents. The forward gradient and the
checkpointed unroll go on from the weights of reverse unrolling at depth 6, as the two-phase recipe of (FG)²U does; the
others start uniform. Runs that are finished are not repeated.

    python benchmarks/camels_strategies.py
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from _results import save
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import camels  # noqa: E402

IMAGES = Path(__file__).parents[1] / "docs" / "images"
FIRST = "reverse 6"
"""Whose language model and weights the others take."""


class Case(NamedTuple):
    """Options of a run, and whether it goes on from the weights of another."""

    strategy: str
    depth: int
    steps: int
    goes_on: bool = False


CASES = {
    FIRST: Case("reverse", 6, 200),
    "forward 24": Case("forward", 24, 12, goes_on=True),
    "checkpointed 24": Case("checkpointed", 24, 12, goes_on=True),
    "reverse 4": Case("reverse", 4, 200),
    "reverse 2": Case("reverse", 2, 200),
    "reverse 1": Case("reverse", 1, 200),
    "checkpointed 48": Case("checkpointed", 48, 12, goes_on=True),
    "forward 48": Case("forward", 48, 12, goes_on=True),
    "truncated 24": Case("truncated", 24, 60),
    "identity 6": Case("identity", 6, 20),
    "guided 24": Case("guided", 24, 15),
    "pzobo 6": Case("pzobo", 6, 40),
}

SECOND_RATE = 0.25 * 5e-4
"""The outer learning rate of the second phase begins where that of the first ended."""


def run(name: str, seed: int, output: Path) -> dict[str, Any]:
    """Return the results of one run; what is finished is read."""
    folder, first = output / f"{seed}" / name.replace(" ", "-"), output / f"{seed}" / FIRST.replace(" ", "-")
    path = folder / "camels.json"
    if not path.exists():
        case = CASES[name]
        options = ["--quiet", "--seed", str(seed), "--output", str(folder), "--strategy", case.strategy]
        options += ["--depth", str(case.depth), "--steps", str(case.steps)]
        if name != FIRST:
            options += ["--base", str(first / "camels" / "lm"), "--tune-steps", "0", "--weightings", "learned"]
        if case.goes_on:
            options += ["--weights", str(first / "camels" / "weights.pt"), "--outer-lr", str(SECOND_RATE)]
        folder.mkdir(parents=True, exist_ok=True)
        camels.main(options)
    return json.loads(path.read_text())


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the values, their mean, and half the width of its 95% interval by Student's t."""
    half = None
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return {"values": list(values), "mean": statistics.fmean(values), "half_width": half}


def summary(rows: Sequence[dict[str, Any]], weighting: str) -> dict[str, Any]:
    """Return the scores of one way of weighting over seeds."""
    scores = [row["adaptation"][weighting] for row in rows]
    before = [row["adaptation"]["no adaptation"]["answer_nll"] for row in rows]
    found = {name: interval([score[name] for score in scores]) for name in ("answer_nll", "exact_match", "f1")}
    found["gain"] = interval([old - score["answer_nll"] for old, score in zip(before, scores, strict=True)])
    found["lr"] = [score["lr"] for score in scores]
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="for reverse unrolling at depth 6")
    parser.add_argument("--other-seeds", type=int, default=3, help="for everything else")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--output", type=Path, default=Path("outputs/camels_strategies"), help="folder of the runs")
    args = parser.parse_args(argv)

    results: dict[str, Any] = {}
    for name in args.cases:
        rows = [run(name, seed, args.output) for seed in range(args.seeds if name == FIRST else args.other_seeds)]
        results[name] = {
            **CASES[name]._asdict(),
            "seeds": len(rows),
            "auroc": interval([row["auroc"] for row in rows]),
            "weight of facts": interval([row["mean weight"]["facts"] for row in rows]),
            "weight of other tokens": interval([row["mean weight"]["other tokens"] for row in rows]),
            "learned": summary(rows, "learned"),
            "seconds": interval([row["seconds"]["weights"] for row in rows]),
        }
        if name == FIRST:
            for weighting in ("no adaptation", "uniform", "oracle"):
                results[name][weighting] = summary(rows, weighting)
            pairs = [row["adaptation"] for row in rows]
            better = [pair["uniform"]["answer_nll"] - pair["learned"]["answer_nll"] for pair in pairs]
            results[name]["learned over uniform"] = interval(better)
            for picture in ("weights", "gain"):
                shutil.copy(args.output / "0" / "reverse-6" / f"camels_{picture}.png", IMAGES)
        settings = {"seeds": args.seeds, "other_seeds": args.other_seeds, "transformers": version("transformers")}
        save("camels_strategies", settings, results)
    return results


if __name__ == "__main__":
    main()
