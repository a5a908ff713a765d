"""One penalty per feature, and learning rate with momentum, over several seeds: PZOBO (arXiv 2110.07004), section 4.4.

A seed draws the split of training and validation examples, the noise features of the digits and the directions. 20
Newsgroups runs where `--data-dir` leads to it; results of other seeds and data stay.

    python benchmarks/papers/hyperparameters.py --data digits
    python benchmarks/papers/hyperparameters.py --data newsgroups --data-dir FOLDER --seeds 0 1 2
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.results import earlier, plot_path, save, to_docs

import hyperparameters as example

LONG = ("curve", "penalties", "path", "grid")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--data", choices=["digits", "newsgroups"], default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    args = script.begin(parser, argv)
    results: dict[str, Any] = {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--data", args.data, "--seed", str(seed), "--quiet", "--output", folder]
            found = example.main(options + (["--data-dir", str(args.data_dir)] if args.data_dir else []))
            if seed == 0:
                name = f"hyperparameters_{args.data}"
                shutil.copy(Path(folder) / f"{name}.png", plot_path(name))
                to_docs(name)
        results = earlier("hyperparameters")  # read only now: other seeds may have been run meanwhile
        names = ("penalties", "learning rate")
        tasks = {task: [short(row) for row in found[task] + found["without"][task]] for task in names}
        results.setdefault(args.data, {})[str(seed)] = tasks
        save("hyperparameters", {"seeds": {name: sorted(rows) for name, rows in results.items()}}, results)
    return results


def short(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without what is only drawn."""
    return {name: value for name, value in row.items() if name not in LONG}


if __name__ == "__main__":
    main()
