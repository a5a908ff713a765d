"""Validation loss against outer steps and seconds: FSLA (arXiv 2112.04660), section 6.2, Figures 2 and 3.

MNIST, 5,000 training images of whose labels 80% are wrong, 5,000 validation images with right ones, a convolutional
net of four layers, minibatches. FSLA is compared with back-propagation (BP), Neumann series (NS) and conjugate
gradients (CG); a name ends with the inner steps T and the terms or iterations K, as in the paper. With T = 1 the net
goes on from one outer step to the next (single loop), else it starts anew each time (double loop).

Seconds are CPU seconds of the process, one thread, of all that the Trainer does from the start of `fit`; the loss on
all validation images is taken at chosen moments, which do not count. Results of other seeds and methods stay.

    python benchmarks/papers/data_cleaning_curves.py --data-dir FOLDER_WITH_MNIST --seeds 0 1 2
    python benchmarks/papers/data_cleaning_curves.py --draw
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from matplotlib.axes import Axes
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lightning_bilevel import (
    FSLA,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
)
from lightning_bilevel.linear_solvers import ConjugateGradient, Neumann

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.cleaning import (
    BATCH_SIZE,
    BETA,
    CORRUPTION,
    DAMPING,
    INNER_LR,
    OUTER_LR,
    SPARE,
    CleaningCNN,
    Clock,
    Episodes,
    Watch,
    cnn_data,
    fit,
    validation_loss,
)
from support.results import earlier, keep, plot, to_docs

import report
from data_cleaning import CleaningData

NAME = "data_cleaning_curves"


@dataclass(frozen=True)
class Method:
    """A curve.

    Attributes:
        strategy: makes it.
        inner_steps: T.
        inner_start: "warm" is the single loop.
        spare: inner batches beyond the steps.
    """

    strategy: Callable[[], HypergradientStrategy]
    inner_steps: int
    inner_start: str = "warm"
    spare: int = SPARE


def neumann(terms: int) -> Callable[[], HypergradientStrategy]:
    return lambda: ImplicitGradient(Neumann(terms, step_size=INNER_LR))


def conjugate_gradient(iterations: int) -> Callable[[], HypergradientStrategy]:
    return lambda: ImplicitGradient(ConjugateGradient(iterations, damping=DAMPING))


METHODS = {
    "FSLA": Method(lambda: FSLA(beta=BETA, eta=0.5), 1),
    "CG-1-1": Method(conjugate_gradient(1), 1),
    "CG-1-10": Method(conjugate_gradient(10), 1),
    "CG-50-10": Method(conjugate_gradient(10), 50, "reset"),
    "NS-1-20": Method(neumann(20), 1),
    "NS-50-20": Method(neumann(20), 50, "reset"),
    "BP-20": Method(ReverseUnroll, 20, "reset", spare=0),
    "BP-50": Method(ReverseUnroll, 50, "reset", spare=0),
}


def marks(budget: float, count: int = 16, first: float = 0.5) -> list[float]:
    """Return moments from ``first`` to ``budget``, each later than the one before by the same factor."""
    first = min(first, budget / 2)
    return [first * (budget / first) ** (k / (count - 1)) for k in range(count)]


def curve(method: Method, data: CleaningData, seed: int, budget: float) -> dict[str, Any]:
    """Run a method for ``budget`` seconds; return its curve and how well its weights tell the wrong labels."""
    pl.seed_everything(seed, verbose=False)
    options = {"inner_lr": INNER_LR, "outer_lr": OUTER_LR}
    module = CleaningCNN(len(data.train), method.inner_steps, method.inner_start, **options)
    rows: list[tuple[int, float, float]] = []

    def look(step: int, seconds: float, logits: Tensor) -> bool:
        rows.append((step, seconds, validation_loss(module.net, data)))
        return False

    episodes = Episodes(data, method.inner_steps + method.spare, BATCH_SIZE, seed)
    fit(module, method.strategy(), episodes, Watch(Clock(), marks(budget), look))
    steps, seconds, losses = zip(*rows, strict=True)
    auroc = binary_auroc(-module.logits.detach(), data.is_wrong.long()).item()
    return {"steps": steps, "seconds": seconds, "losses": losses, "auroc": auroc}


def run(args: argparse.Namespace) -> None:
    """Run what is asked for, saving each curve as it comes."""
    for seed in args.seeds:
        data = cnn_data(args.data_dir, seed)
        for name in args.methods:
            found = curve(METHODS[name], data, seed, args.seconds)
            settings = {
                "corruption": CORRUPTION,
                "batch size": BATCH_SIZE,
                "inner lr": INNER_LR,
                "outer lr": OUTER_LR,
                "beta": BETA,
                "damping": DAMPING,
                "seconds": args.seconds,
            }
            keep(NAME, settings, found, name, str(seed), order=METHODS)
            print(f"{name} {seed}: {found['steps'][-1]} steps, loss {found['losses'][-1]:.3f}", flush=True)


COLORS = {"FSLA": report.BLUE, "CG": "#AA4499", "NS": report.GREEN, "BP": report.VERMILION}
LINES = {"CG-1-1": ":", "CG-50-10": "--", "NS-50-20": "--", "BP-20": "--", "BP-50": "-."}


def draw() -> None:
    """Draw the means over seeds against outer steps and seconds, each seed faintly behind."""
    with plot(NAME, 1, 2, size=(11, 4.6), sharey=True) as (figure, (left, right)):
        for name, runs in earlier(NAME).items():
            seeds = list(runs.values())
            for axes, key in ((left, "steps"), (right, "seconds")):
                line(axes, name, seeds, key)
        left.set(xscale="log", xlabel="outer steps", ylabel="validation loss", title="Each outer step counts the same")
        right.set(xscale="log", xlabel="CPU seconds", title="Each second counts the same")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", title="method-T-K", alignment="left")
    to_docs(NAME)


def line(axes: Axes, name: str, seeds: Sequence[Mapping[str, Any]], key: str) -> None:
    """Draw one method: its seeds, and their mean as far as all of them go."""
    color, dashes = COLORS[name.split("-")[0]], LINES.get(name, "-")
    for seed in seeds:
        axes.plot(seed[key], seed["losses"], color=color, lw=0.7, alpha=0.3)
    places = np.geomspace(max(seed[key][0] for seed in seeds), min(seed[key][-1] for seed in seeds), 30)
    means = np.mean([np.interp(places, seed[key], seed["losses"]) for seed in seeds], axis=0)
    axes.plot(places, means, color=color, ls=dashes, label=name)


def main(argv: Sequence[str] | None = None) -> None:
    parser = script.options(__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with the four MNIST files")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(3))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=12.0, help="CPU seconds of each curve (%(default)s)")
    parser.add_argument("--draw", action="store_true", help="only draw what is stored")
    args = script.begin(parser, argv)
    if not args.draw:
        if args.data_dir is None:
            parser.error("pass --data-dir, or --draw")
        run(args)
    draw()


if __name__ == "__main__":
    main()
