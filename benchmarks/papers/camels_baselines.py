"""Are the weights of CaMeLS better than weights that need no training, over seeds?

Synthetic documents, small language model: the run of `camels_strategies.py` through 6 documents. Beside it weights that
are uniform, or say how rare a token is among the documents of pretraining, IDF and TF-IDF; each with a rate of
adaptation of its own, chosen on validation documents as that of the learned weights is. Runs that are finished are not
repeated.

    python benchmarks/papers/camels_baselines.py
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from camels_strategies import FIRST, comparison, run

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.intervals import interval
from support.results import IMAGES, save


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("outputs/camels_strategies"), help="folder of the runs")
    args = script.begin(parser, argv)
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        rows.append(run(FIRST, seed, args.output))
        found = {
            **comparison(rows),
            "auroc": interval([row["auroc"] for row in rows]),
            "weight of facts": interval([row["mean weight"]["facts"] for row in rows]),
            "weight of other tokens": interval([row["mean weight"]["other tokens"] for row in rows]),
            "CPU seconds": [row["CPU seconds"] for row in rows],
        }
        save("camels_baselines", {"seeds": len(rows), "transformers": version("transformers")}, found)
    for picture in ("weights", "gain"):
        shutil.copy(args.output / "0" / FIRST.replace(" ", "-") / f"camels_{picture}.png", IMAGES)
    return found


if __name__ == "__main__":
    main()
