"""CaMeLS on SQuAD with a small language model that is trained on half of the articles given.

Far from the paper's models: it shows the code on real text, and reports what comes out.

    python benchmarks/papers/camels_squad.py --data-dir FOLDER_WITH_SQUAD
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from camels_strategies import comparison

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.intervals import interval
from support.results import save

import camels

KEPT = ("documents", "questions", "left out", "mean weight", "parameters", "answers")
"""Of the results of a run."""

OPTIONS = {
    "pretrain-steps": 400,
    "tune-steps": 600,
    "batch-size": 8,
    "steps": 100,
    "stream": 100,
    "adapt-lr": [0.01, 0.03, 0.1, 0.3, 1.0],
}
"""Of `examples/camels.py`, the rest as it is by default."""


def run(seed: int, data: Path, output: Path) -> dict[str, Any]:
    """Return the results of one run; what is finished is read, what was cut off goes on."""
    folder = output / str(seed)
    path = folder / "camels.json"
    if not path.exists():
        words = [str(word) for name, value in OPTIONS.items() for word in (f"--{name}", *_listed(value))]
        words += ["--quiet", "--resume", "--seed", str(seed), "--data-dir", str(data), "--output", str(folder)]
        camels.main(words)
    return json.loads(path.read_text())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with SQuAD's JSON files")
    parser.add_argument("--seeds", type=int, default=1, help="at least one (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/camels_squad"), help="folder of the runs")
    args = script.begin(parser, argv)

    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        rows.append(run(seed, args.data_dir, args.output))
        found = {
            "adaptation": {**comparison(rows), **over_documents(rows)},
            "auroc": interval([row["auroc"] for row in rows]),
            "runs": [{name: row[name] for name in KEPT} for row in rows],
        }
        save("camels_squad", {**OPTIONS, "strategy": "reverse", "depth": 6, "seeds": len(rows)}, found)
    return found


def over_documents(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return gains and differences with intervals over the documents of all runs, not over the few runs."""
    gains = {
        name: [gain for row in rows for gain in row["adaptation"][name]["gain by document"]]
        for name in rows[0]["adaptation"]
        if name != "no adaptation"
    }
    found = {f"gain of {name}": interval(values) for name, values in gains.items()}
    for name in [name for name in gains if name != "learned"]:
        pairs = zip(gains["learned"], gains[name], strict=True)
        found[f"learned over {name}"] = interval([own - other for own, other in pairs])
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


if __name__ == "__main__":
    main()
