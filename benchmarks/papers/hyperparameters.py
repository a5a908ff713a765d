"""One penalty per feature, and learning rate with momentum, over several seeds: PZOBO (arXiv 2110.07004), section 4.4.

A seed draws the split of training and validation examples, the noise features of the digits and the directions. 20
Newsgroups runs where `--data-dir` leads to it; results of other seeds and data stay.

    python benchmarks/papers/hyperparameters.py --data digits
    python benchmarks/papers/hyperparameters.py --data newsgroups --data-dir FOLDER
    python benchmarks/papers/hyperparameters.py --without          (baselines, beside the runs that are there)
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.results import RESULTS, earlier, keep, plot_path, save, to_docs

import hyperparameters as example

NAME = "hyperparameters"
LONG = ("curve", "penalties", "path", "grid")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--data", choices=["digits", "newsgroups"], default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--without", action="store_true", help="only what needs no hypergradient, for seeds with runs")
    args = script.begin(parser, argv)
    results: dict[str, Any] = {}
    for seed in args.seeds:
        if args.without:
            rows = baselines(seed, earlier(NAME)[args.data][str(seed)], args)
            results = keep(NAME, settings(), rows, args.data, str(seed))
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = ["--data", args.data, "--seed", str(seed), "--quiet", "--output", folder]
            found = example.main(options + (["--data-dir", str(args.data_dir)] if args.data_dir else []))
            if seed == 0:
                name = f"hyperparameters_{args.data}"
                shutil.copy(Path(folder) / f"{name}.png", plot_path(name))
                to_docs(name)
        results = earlier(NAME)  # read only now: other seeds may have been run meanwhile
        names = ("penalties", "learning rate")
        tasks = {task: [short(row) for row in found[task] + found["without"][task]] for task in names}
        results.setdefault(args.data, {})[str(seed)] = tasks
        save(NAME, {"seeds": {name: sorted(rows) for name, rows in results.items()}}, results)
    return results


def baselines(seed: int, rows: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return the rows of a seed with those of the baselines, which get the seconds of what is there."""
    data = example.noisy_digits(seed) if args.data == "digits" else example.newsgroups(seed, args.data_dir)
    options = argparse.Namespace(seed=seed, smoke=False)
    searches = {"penalties": example.penalties_without, "learning rate": example.rates_without}
    kept = {task: [row for row in rows[task] if row["method"] in ("grid", *example.STRATEGIES)] for task in searches}
    return {task: kept[task] + run(data, example.longest(kept[task]), options) for task, run in searches.items()}


def settings() -> dict[str, Any]:
    """Return the settings of the file, which stay."""
    return json.loads((RESULTS / f"{NAME}.json").read_text())["settings"]


def short(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without what is only drawn."""
    return {name: value for name, value in row.items() if name not in LONG}


if __name__ == "__main__":
    main()
