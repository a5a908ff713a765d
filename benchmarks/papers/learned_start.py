"""Drawing unseen digits in three gradient steps, from a learned start and from others, over seeds.

A seed draws the split of the digits, the frequencies, the nets and what they are trained on. See
`examples/learned_start.py`; the picture is that of seed 0.

    python benchmarks/papers/learned_start.py
    python benchmarks/papers/learned_start.py --strategy first-order --seeds 0 1 2
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

import learned_start as example

NAME = "learned_start"
KEPT = ("seconds", "learned rate", "psnr", "ahead by", "rules")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--strategy", choices=example.STRATEGIES, default="reverse")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--smoke", action="store_true", help="runs of seconds")
    args = script.begin(parser, argv)
    results: dict[str, Any] = earlier(NAME)
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--strategy", args.strategy, "--seed", str(seed), "--quiet", "--output", folder]
            found = example.main(options + (["--smoke"] if args.smoke else []))
            if seed == 0 and args.strategy == "reverse":
                shutil.copy(Path(folder) / f"{NAME}.png", plot_path(NAME))
                to_docs(NAME)
        results.setdefault(args.strategy, {})[str(seed)] = {key: found[key] for key in KEPT}
        save(NAME, {"seeds": {name: sorted(rows) for name, rows in results.items()}}, results)
    return results


if __name__ == "__main__":
    main()
