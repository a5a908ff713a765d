"""What do compiled inner steps gain on a GPU, and what CUDA graphs?

A hypergradient of problems of `against_jax`, as it is, with ``compile=True`` and without CUDA graphs, and with
``compile=True``, which makes CUDA graphs where tensors are small. That all compute the same is checked first.
Milliseconds of an estimate: the least of some, each awaited on the GPU, in turns; the first one is listed beside.

    python benchmarks/cost/compiled_on_cuda.py [--cases sinusoids images] [--device cpu, to try the script]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from pytorch_lightning.utilities import move_data_to_device

from lightning_bilevel import hypergradient, tree
from lightning_bilevel.compiled import graphs

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))
from against_jax import CASES, Case
from support import script
from support.measure import turns
from support.results import keep

import report

NAME = "compiled_on_cuda"
ROUNDING = 1e-3
WAYS = {"as it is": (False, 0), "compiled": (True, 0), "with CUDA graphs": (True, graphs.MOST_NUMBERS_OF_A_CUDA_GRAPH)}
"""Whether inner steps are compiled, and how many numbers a CUDA graph may take."""


def measured(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of an estimate each way, and the seconds of the first one."""
    estimates: dict[str, Callable[[], Any]] = {}
    found: dict[str, Any] = {}
    expected: tree.Params = {}
    for way, (compiles, most) in WAYS.items():
        module, batch = case.make()
        module.compiles_steps = compiles
        module.to(device)
        batch = move_data_to_device(batch, torch.device(device))
        estimates[way] = partial(hypergradient, module, case.strategy(), batch)
        with patch.object(graphs, "MOST_NUMBERS_OF_A_CUDA_GRAPH", most):
            first = seconds(estimates[way])
        grads = estimates[way]().grads
        expected = expected or grads
        apart = float(tree.norm(tree.sub(grads, expected)) / tree.norm(expected))
        if not apart <= ROUNDING:
            raise SystemExit(f"{way}: the hypergradient is apart by {apart:.1e} of its size.")
        found[way] = {"first s": first, "apart": apart}
    taking_turns = turns({way: partial(seconds, estimate) for way, estimate in estimates.items()})
    for _, best in zip(range(rounds), taking_turns, strict=False):
        for way, least in best.items():
            found[way]["ms"] = 1000 * least
    return found


def seconds(run: Callable[[], Any]) -> float:
    """Return how long a call takes until the GPU has done with it."""
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=20, help="estimates of each (%(default)s)")
    args = script.begin(parser, argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device; `--device cpu` tries the script")
    results: dict[str, Any] = {}
    for name in args.cases:
        found = measured(CASES[name], args.device, args.rounds)
        rows = [[way, f"{row['ms']:.2f}", f"{row['first s']:.1f}", f"{row['apart']:.0e}"] for way, row in found.items()]
        report.print_table(f"{name}, {args.device}", ["", "ms", "first, s", "apart by"], rows)
        if args.device.startswith("cuda"):
            results = keep(NAME, {"rounds": args.rounds}, found, name, order=CASES)
    return results


if __name__ == "__main__":
    main()
