"""CaMeLS on SQuAD with a small language model that is trained on half of the articles given.

Far from the paper's models: it shows the code on real text, and reports what comes out.

    python benchmarks/camels_squad.py --data-dir FOLDER_WITH_SQUAD
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _results import save

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import camels  # noqa: E402

OPTIONS = {
    "window": 128,
    "pretrain-steps": 500,
    "tune-steps": 500,
    "batch-size": 8,
    "steps": 150,
    "inner-lr": 0.1,
    "stream": 60,
    "adapt-lr": [0.01, 0.03, 0.1],
}
"""Of `examples/camels.py`; the window leaves the shorter paragraphs."""


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with SQuAD's JSON files")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/camels_squad"), help="folder of the runs")
    args = parser.parse_args(argv)
    words = [str(word) for name, value in OPTIONS.items() for word in (f"--{name}", *_listed(value))]
    kept = ("documents", "questions", "left out", "auroc", "mean weight", "adaptation", "seconds", "parameters")
    results = []
    for seed in range(args.seeds):
        folder = args.output / str(seed)
        found = camels.main(
            ["--quiet", "--seed", str(seed), "--data-dir", str(args.data_dir), "--output", str(folder), *words]
        )
        results.append({name: found[name] for name in kept})
        save("camels_squad", {**OPTIONS, "strategy": "reverse", "depth": 6, "seeds": seed + 1}, results)
    return results


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


if __name__ == "__main__":
    main()
