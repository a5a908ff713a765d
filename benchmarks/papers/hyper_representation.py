"""Hyper-representation over several seeds: PZOBO (arXiv 2110.07004), Figures 2, 3 and 4.

A seed draws the data, the start, the batches and the directions. `two-layer` has the paper's size. `digits` and `mnist`
are `lenet`; MNIST needs `--data-dir`, and every strategy has the same CPU seconds there. `--inner-steps` compares
numbers N of inner steps, for PZOBO with directions of length 1. Results of other seeds and cases stay.

    python benchmarks/papers/hyper_representation.py --case linear
    python benchmarks/papers/hyper_representation.py --case mnist --data-dir FOLDER --seeds 0
    python benchmarks/papers/hyper_representation.py --inner-steps
    python benchmarks/papers/hyper_representation.py --without         (one level, beside runs that are there)
    python benchmarks/papers/hyper_representation.py --seeds           (draws only)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.results import earlier, plot_path, save, to_docs

import hyper_representation as example
import report

NAME = "hyper_representation"
DRAWN = ("outer_loss", "test_accuracy", "true_norm", "cpu_seconds")
CASES: Mapping[str, Sequence[str]] = {
    "linear": ["--problem", "linear"],
    "two-layer": ["--problem", "two-layer", "--full", "--steps", "40", "--every", "8"],
    "digits": ["--problem", "lenet"],
    "mnist": ["--problem", "lenet", "--steps", "1000", "--every", "15"],
}
INNER_STEPS: Mapping[str, tuple[Sequence[str], Sequence[int]]] = {
    "linear": (["--problem", "linear"], (10, 20, 40)),
    "two-layer": (["--problem", "two-layer"], (5, 10, 20, 50)),
    "digits": (["--problem", "lenet", "--every", "20"], (5, 10, 20)),
}
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = script.options(__doc__)
    parser.add_argument("--case", choices=CASES, nargs="+", default=["linear", "two-layer", "digits"])
    parser.add_argument("--seeds", type=int, nargs="*", default=range(5))
    parser.add_argument("--strategy", choices=example.STRATEGIES, nargs="+", default=list(example.STRATEGIES))
    parser.add_argument("--data-dir", type=Path, help="folder with the four MNIST files")
    parser.add_argument("--seconds", type=float, default=20, help="of each strategy on MNIST (%(default)s)")
    parser.add_argument("--inner-steps", action="store_true", help="compare numbers of inner steps")
    parser.add_argument(
        "--without", action="store_true", help="only what needs no second level, for runs that are there"
    )
    args = script.begin(parser, argv)
    if "mnist" in args.case and args.data_dir is None:
        parser.error("mnist needs --data-dir")
    for seed in args.seeds:
        if args.inner_steps:
            for case in [case for case in INNER_STEPS if case in args.case]:
                options, counts = INNER_STEPS[case]
                for count in counts:
                    run(f"{case}, N", seed, [*options, "--inner-steps", str(count), "--strategy", "pzobo-unit"])
        elif args.without:
            for case in args.case:
                one_level(case, seed, args)
        else:
            for case in args.case:
                mnist = ["--data-dir", str(args.data_dir), "--seconds", str(args.seconds)] if case == "mnist" else []
                run(case, seed, [*CASES[case], *mnist, "--strategy", *args.strategy])
    rows = earlier(NAME) or []
    draw(rows)
    return rows


def run(case: str, seed: int, options: Sequence[str]) -> None:
    """Run what the options of the example lead to, and keep each result as soon as it is there."""
    with TemporaryDirectory() as folder, report.screen():
        args = example.arguments([*options, "--seed", str(seed), "--quiet", "--output", folder])
        for pair in args.cases:
            row = {"case": case, **example.learn(*pair, args)}
            print(case, seed, row["strategy"], f"{row['outer_loss']:.3g}", flush=True)
            row["curves"] = {name: short(row["curves"][name]) for name in DRAWN if name in row["curves"]}
            keep(row)


def one_level(case: str, seed: int, args: Any) -> None:
    """Keep what one level leads to, in as many CPU seconds as the slowest strategy of the seed took."""
    options = [*CASES[case], *(["--data-dir", str(args.data_dir)] if case == "mnist" else [])]
    chosen = example.arguments([*options, "--seed", str(seed), "--quiet"])
    runs = [row for row in earlier(NAME) if row["case"] == case and row["seed"] == seed and "curves" in row]
    for problem in chosen.problem:
        row = {"case": case, **example.without(problem, example.longest(runs, problem), chosen)}
        print(case, seed, row["strategy"], {key: value for key, value in row.items() if isinstance(value, float)})
        keep(row)


def short(curve: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    """Return a curve in 4 digits."""
    steps, values = curve
    return steps, [float(f"{value:.4g}") for value in values]


def keep(row: Row) -> None:
    """Save a row with the others, in place of what an earlier run of the same kind found."""

    def kind(row: Row) -> tuple[Any, ...]:
        return row["case"], row["strategy"], row["inner_steps"], row["seed"]

    rows = [other for other in earlier(NAME) if kind(other) != kind(row)] + [row]
    save(NAME, {case: {"options": CASES[case]} for case in CASES}, rows)


def draw(rows: Sequence[Row]) -> None:
    """Draw the strategies' runs, those of each case that was run."""
    with report.screen():
        example.draw(
            plot_path(NAME), [row for case in CASES for row in rows if row["case"] == case and "curves" in row]
        )
    to_docs(NAME)


if __name__ == "__main__":
    main()
