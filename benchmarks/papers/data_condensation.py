"""Condensed sets by every strategy, in the same CPU seconds and after the same outer steps: (FG)2U, section 4.

A case is a data set and a number of images per class; `digits-1` and `digits-10` start from the centres that k-means
finds in each class, the others from real images. One run is one strategy and one seed, which draws the real images
to start from, the inner nets and the batches; its accuracies, losses and images are saved when it ends, and results of
other runs stay. `two-phase` spends half of its seconds on the first phase, for which `truncated` has to have run.

    python benchmarks/papers/data_condensation.py --case digits
    python benchmarks/papers/data_condensation.py --case digits-1 digits-10 --seeds 0 1 2 3 4
    python benchmarks/papers/data_condensation.py --case mnist mnist-28 mnist-10 mnist-50 --data-dir FOLDER
    python benchmarks/papers/data_condensation.py --case mnist-10 --strategy forward --least-steps 5 --data-dir FOLDER
    python benchmarks/papers/data_condensation.py --case digits --baselines          (only what is not learned)
    python benchmarks/papers/data_condensation.py --draw
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.results import RESULTS, earlier, keep, plot_path, to_docs

import data_condensation as example
import report
from lightning_bilevel import Episode, hypergradient

NAME = "data_condensation"
ALL = ("reverse", "truncated", "forward", "hessian-free", "neumann", "guided", "two-phase")


class Case(NamedTuple):
    """Options of the example, its strategies, the CPU seconds of each, and outer steps after which to test."""

    options: tuple[str, ...]
    strategies: tuple[str, ...]
    seconds: float
    steps: tuple[int, ...]


PAPER = ("reverse", "truncated", "hessian-free", "neumann", "forward")
"""The strategies of (FG)2U, table 1."""

CASES = {
    "digits": Case((), ALL, 35, (5, 10, 20)),
    "digits-150": Case(("--steps", "150"), PAPER, 3600, (50, 100)),
    "digits-600": Case((), ("truncated", "two-phase"), 600, ()),
    "mnist": Case(("--pixels", "14"), ALL, 40, (5, 20)),
    "mnist-28": Case((), PAPER, 160, (5,)),
    "mnist-10": Case(("--pixels", "14", "--per-class", "10"), ("checkpointed", "truncated", "forward"), 40, (5,)),
    "digits-1": Case(("--start", "centres"), ("reverse",), 35, ()),
    "digits-10": Case(("--start", "centres", "--per-class", "10"), ("reverse",), 35, ()),
    "mnist-50": Case(("--pixels", "14", "--per-class", "50"), ("checkpointed", "truncated", "forward"), 40, (3,)),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = script.options(__doc__)
    parser.add_argument("--case", choices=CASES, nargs="+", default=[])
    parser.add_argument("--strategy", choices=example.STRATEGIES, nargs="+", help="some of the case's (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--least-steps", type=int, default=1, help="outer steps, if those take longer")
    parser.add_argument("--baselines", action="store_true", help="only what needs no outer level, anew")
    parser.add_argument("--cosines", action="store_true", help="with the exact hypergradient at the start, instead")
    parser.add_argument("--draw", action="store_true", help="draw what was saved")
    args = script.begin(parser, argv)
    warnings.filterwarnings("ignore", "`Neumann.*diverges")
    with report.screen():
        for name in args.case:
            for seed in args.seeds:
                (compare_directions if args.cosines else run_case)(name, seed, args)
        if args.draw:
            draw_all()


def run_case(name: str, seed: int, args: argparse.Namespace) -> None:
    """Run the strategies of one case, and what they are compared with if that was not done before or is all."""
    case = CASES[name]
    chosen, data = prepared(name, seed, args)
    for strategy in () if args.baselines else args.strategy or case.strategies:
        with tempfile.TemporaryDirectory() as folder:
            chosen.output = Path(folder)
            if strategy == "two-phase":
                chosen.phase_steps = saved()[name][str(seed)]["truncated"]["outer steps"] // 2
            add(name, seed, strategy, *judged(data, example.condense(data, strategy, chosen), case.steps, chosen))
    if args.baselines or "baselines" not in saved().get(name, {}).get(str(seed), {}):
        found = {"real images": example.test_real(data, chosen), **example.test_chosen(data, chosen)}
        if chosen.start == "real":
            found["start"] = example.test(data, example.start_of(data, chosen), chosen)
        if chosen.start == "real" and chosen.per_class == 1:
            found["whole training set"] = example.test_whole(data, chosen)
        add(name, seed, "baselines", found, {})


def prepared(name: str, seed: int, args: argparse.Namespace) -> tuple[argparse.Namespace, example.Data]:
    """Return the example's options for a case, and its data."""
    case = CASES[name]
    options = ["--quiet", *case.options, "--seconds", str(case.seconds), "--seed", str(seed)]
    options += ["--least-steps", str(args.least_steps)]
    if name.startswith("mnist"):
        options += ["--data-dir", str(args.data_dir)]
    chosen = example.parse(options)
    return chosen, example.load(chosen.data_dir, chosen.pixels, seed)


def compare_directions(name: str, seed: int, args: argparse.Namespace) -> None:
    """Save each strategy's cosine with the exact hypergradient at the start, for three nets and batches."""
    chosen, data = prepared(name, seed, args)
    labels = example.labels_of(chosen.per_class)
    found: dict[str, list[float]] = {}
    for net in range(3):
        torch.manual_seed(net)
        start = example.start_of(data, chosen)
        module = example.Condensation(start, chosen.width, chosen.inner_steps, chosen.inner_lr, chosen.outer_lr)
        batch = torch.randperm(len(data.train_y))[: chosen.outer_batch]
        episode = Episode([(torch.arange(len(labels)), labels)], (data.train_x[batch], data.train_y[batch]))
        strategies = ["reverse", *(args.strategy or [each for each in ALL if each not in ("reverse", "two-phase")])]
        exact, *others = (
            hypergradient(module, example.STRATEGIES[each](chosen.inner_lr, None), episode).grads["images"].flatten()
            for each in strategies
        )
        for each, estimate in zip(strategies[1:], others, strict=True):
            found.setdefault(each, []).append(torch.cosine_similarity(exact, estimate, dim=0).item())
    add(name, seed, "cosines", {**saved().get(name, {}).get(str(seed), {}).get("cosines", {}), **found}, {})


def judged(
    data: example.Data, run: dict[str, Any], steps: Sequence[int], args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return a run's numbers, accuracies among them, and its images."""
    images = run["images"]
    end = images[run["outer steps"] - 1]
    reached = [step for step in steps if step <= len(images)]
    numbers = {
        "outer steps": run["outer steps"],
        "CPU seconds": run["CPU seconds"],
        "accuracy": example.test(data, end, args),
        "accuracy after": {step: example.test(data, images[step - 1], args) for step in reached},
        "losses": [round(loss, 3) for loss in run["losses"]],
        "seconds": [round(second, 2) for second in run["seconds"]],
    }
    return numbers, {"start": run["start"], "images": end}


def saved() -> dict[str, Any]:
    """Return what was saved so far: by case, seed and strategy."""
    return earlier(NAME)


def saved_images() -> dict[str, np.ndarray]:
    """Return the images saved so far, by "case/strategy"."""
    file = RESULTS / f"{NAME}.npz"
    return dict(np.load(file)) if file.is_file() else {}


def add(name: str, seed: int, strategy: str, numbers: dict[str, Any], images: dict[str, torch.Tensor]) -> None:
    """Add a run to what was saved; of the images, the first hundred of seed 0."""
    keep(NAME, {key: case._asdict() for key, case in CASES.items()}, numbers, name, str(seed), strategy)
    if seed == 0 and images:
        added = {f"{name}/{strategy}": images["images"], f"{name}/start": images["start"]}
        arrays = {key: value[:100].half().numpy() for key, value in added.items()}
        np.savez_compressed(RESULTS / f"{NAME}.npz", **{**saved_images(), **arrays})


def draw_all() -> None:
    """Draw images and losses of seed 0: of several strategies at one image per class, of one at ten."""
    images = {key: torch.tensor(value).float() for key, value in saved_images().items()}
    drawn = {"digits": ALL, "digits-150": PAPER, "mnist": ALL, "mnist-10": ("checkpointed",)}
    for name, strategies in drawn.items():
        found = saved()[name]["0"]
        runs = [
            {**found[key], "strategy": key, "start": images[f"{name}/start"], "images": [images[f"{name}/{key}"]]}
            for key in example.STRATEGIES
            if key in strategies
        ]
        example.draw(plot_path(f"condensation_{name}"), runs, found["baselines"]["start"])
        to_docs(f"condensation_{name}")


if __name__ == "__main__":
    main()
