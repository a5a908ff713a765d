"""Can published LightningModules be wrapped by `bilevel` as they are?

Rows of a dozen packages, each with tiny data made here (nothing is fetched but the packages): what makes the module,
and which of its parameters are inner and outer. Each row is

- fitted for three outer steps by a Trainer with each of four strategies: ok, refused or failed, and why;
- compared: the gradients that the optimizer gets from `ReverseUnroll` in float64 (float32 where the module allows no
  other), along a random direction, with central differences of a loop in plain PyTorch, without dropout and with
  reparameterized samples fixed. A loss that stops gradients is compared with a plain backward pass through that loop.

The packages are installed into virtual environments of their own, with the versions in `requirements/`: a few minutes
and 7 GB, once. `--only` takes patterns of packages or of rows, or `recipes`, and keeps what was found for the others.

    python benchmarks/public_modules/public_modules.py --only chemprop "darts: *NBEATS*"
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import gettempdir
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from published.environments import DEFAULT, python_of
from support import script
from support.results import earlier, save

ENVIRONMENTS = {
    "forecasting": ["pytorch_forecasting", "neuralforecast", "darts", "gluonts"],
    "science": ["lightning_demos", "chemprop", "scvi", "pina", "torch_geometric", "transformers", "lightly"],
    "tabular": ["pytorch_tabular", "deeptab"],
}
"""Of each requirements file, the files in ``published/`` whose packages it has."""
RECIPES = {"forecaster": "forecasting", "loss_weight": "science", "molecules": "science"}
"""The programs in ``recipes/``, which the documentation shows, and the environment of each: ``--only recipes``."""
NAME = "public_modules"
ROOT = Path(__file__).parents[2]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Examine the rows, write what was found, return it."""
    parser = script.options(__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="patterns of PACKAGE or PACKAGE: ROW")
    parser.add_argument("--environments", type=Path, default=DEFAULT, metavar="FOLDER", help="where they are kept")
    args = script.begin(parser, argv)
    found = {"rows": {}, "recipes": {}, **earlier(NAME)}
    if any(fnmatchcase("recipes", only) for only in args.only):
        for name, environment in RECIPES.items():
            found["recipes"][name] = printed(python_of(environment, args.environments), name)
    order = [package for packages in ENVIRONMENTS.values() for package in packages]
    for environment, packages in ENVIRONMENTS.items():
        for package in packages:
            chosen = (only.split(": ") for only in args.only if fnmatchcase(package, only.split(": ")[0]))
            for _, *pattern in chosen:
                python = python_of(environment, args.environments)
                found["rows"].update(examined(python, package, *pattern or ["*"]))
            found["rows"] = dict(sorted(found["rows"].items(), key=lambda item: order.index(item[0].split(": ")[0])))
            save(NAME, {"inner steps": 3, "outer steps": 3}, found)
    return found


def examined(python: Path, package: str, pattern: str) -> dict[str, Any]:
    """Return the rows of a package by name, from a process in its environment."""
    last = printed_by([str(python), "-m", "published.worker", package, pattern])
    rows = {f"{package}: {row['class']}": row for row in json.loads(last)}
    for name, row in rows.items():
        error = row.get("agreement", {}).get("error")
        said = {text.split(": ")[0] for text in row["strategies"].values()}
        print(f"{name:55} {'' if error is None else f'{error:.0e}'} {', '.join(sorted(said))}", flush=True)
    return rows


def printed(python: Path, recipe: str) -> str:
    """Return the last line that a recipe prints."""
    print(last := printed_by([str(python), "-W", "ignore", str(Path(__file__).parent / "recipes" / f"{recipe}.py")]))
    return last


def printed_by(command: list[str]) -> str:
    """Return the last line that a process prints, with this checkout and the rows on its path."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    surroundings = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False, cwd=gettempdir())
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
