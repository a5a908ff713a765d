"""Discovery of three differential equations, as in (FG)²U (arXiv 2406.14095), Figure 2 right and appendices E.3, F.3.

Eight parts, of which `--parts` chooses; what the others found before stays in the results:

burgers, allen-cahn, kdv  ν from 64 observations with a spectral solver and ZerothOrder, one direction, from starts
          drawn in the paper's ranges: 5, and 10 for Korteweg–de Vries, some of whose starts end in local minima.
differences  the same optimizer from the same starts, on central differences of the loss, without this library.
search    for ν, without a gradient: a grid of 20 and Brent's method.
accuracy  of the spectral solvers at the true ν, and the CPU seconds of a solution.
memory    the peak memory of a fresh process after one hypergradient of the net, by strategy and inner steps.
pinn      Burgers with a net as the inner level, 1,000 inner steps and ForwardGradient.

    python benchmarks/papers/pde_discovery.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_bilevel import Episode, ForwardGradient, ReverseUnroll, hypergradient

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.results import keep, plot_path, to_docs

import pde_discovery as example
import report
from pde import pinn
from pde.search import descend

STARTS = {"burgers": 5, "allen-cahn": 5, "kdv": 10}
PARTS = (*STARTS, "differences", "search", "accuracy", "memory", "pinn")
MEMORY = (("forward", 10), ("forward", 1000), ("reverse", 10), ("reverse", 100))
PINN_STEPS = 8  # of the outer level; about two minutes on a free core


def discover(name: str, seed: int, starts: int, *options: str) -> dict[str, Any]:
    """Run the example on one equation; return rows and curves."""
    with tempfile.TemporaryDirectory() as folder, report.screen():
        args = example.arguments(["--seed", str(seed), "--quiet", "--output", folder, *options])
        truth, found = example.reference(name), []
        for number, start in enumerate(example.draw_starts(name, starts, seed)):
            found.append(example.discover(args, name, start, truth, number))
            print(found[-1].row, flush=True)
    return {"rows": [run.row for run in found], "curves": [run.curve for run in found]}


def differences(name: str, seed: int) -> list[dict[str, Any]]:
    """Return a row for each start of one equation: Adam on differences of the loss."""
    truth = example.reference(name)

    def row(start: float) -> dict[str, Any]:
        return example.without(name, truth, lambda observed: descend(name, observed, start), start)

    return [row(start) for start in example.draw_starts(name, STARTS[name], seed)]


def draw(results: dict[str, Any]) -> None:
    """Draw the equations that were run; the solutions are solved for again."""
    runs = {
        name: [
            example.Found(row, example.solve(name, row["nu"]), curve)
            for row, curve in zip(results[name]["rows"], results[name]["curves"], strict=True)
        ]
        for name in STARTS
        if name in results
    }
    if runs:
        with report.screen():
            example.draw(plot_path("pde_discovery"), runs, {name: example.reference(name) for name in runs})
        to_docs("pde_discovery")


def accuracy(name: str) -> dict[str, float]:
    """Return the solver's error at the true ν against a grid of twice the points and four times the steps."""
    truth = example.reference(name)
    seconds = []
    for _ in range(5):
        began = time.process_time()
        u = example.solve(name, example.EQUATIONS[name].nu)
        seconds.append(time.process_time() - began)
    return {"error": float(np.linalg.norm(u - truth) / np.linalg.norm(truth)), "CPU seconds": min(seconds)}


def memory(strategy: str, steps: int) -> dict[str, Any]:
    """Measure one combination in a process of its own."""
    command = [sys.executable, __file__, "--measure", strategy, str(steps)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {"strategy": strategy, "inner steps": steps, **json.loads(lines[-1])}


def measure(strategy: str, steps: int) -> None:
    """Print the memory before and the most that this process held until after one hypergradient."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = example.PINNDiscovery("burgers", start=0.1, inner_steps=steps)
    generator = torch.Generator().manual_seed(0)
    inner = [pinn.collocation(module.equation, 256, generator) for _ in range(20)]
    before = report.peak_memory()
    chosen = {"forward": ForwardGradient(num_directions=1), "reverse": ReverseUnroll()}[strategy]
    hypergradient(module, chosen, Episode(inner, torch.zeros(8, 8)))
    print(json.dumps({"before (MiB)": before, "peak (MiB)": report.peak_memory()}))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", nargs=2, metavar=("STRATEGY", "STEPS"), help="one memory measurement")
    args = script.begin(parser, argv)
    if args.measure:
        measure(args.measure[0], int(args.measure[1]))
        return {}
    results: dict[str, Any] = {}
    for part in args.parts:
        if part in STARTS:
            found: Any = discover(part, args.seed, STARTS[part])
        elif part == "differences":
            found = {name: differences(name, args.seed) for name in STARTS}
        elif part == "search":
            found = {name: example.searched(name, example.reference(name)) for name in STARTS}
        elif part == "accuracy":
            found = {name: accuracy(name) for name in STARTS}
        elif part == "memory":
            found = [memory(*combination) for combination in MEMORY]
        else:
            found = discover("burgers", args.seed, 1, "--inner", "pinn", "--steps", str(PINN_STEPS))
        settings = {"seed": args.seed, "starts": STARTS, "outer steps of the net": PINN_STEPS}
        results = keep("pde_discovery", settings, found, part)
    draw(results)
    return results


if __name__ == "__main__":
    main()
