"""Seconds until the result is good: every strategy, and the same problem with other libraries.

On scikit-learn's digits, the problem of `examples/data_cleaning.py`: until a net that is trained anew with the learned
weights has 93% test accuracy. On MNIST, that of `data_cleaning_curves.py` with 10 inner steps and a warm start: until
the net's loss on the 5,000 validation images is below 1.5. All get the same data in the same order, the same start, the
same inner optimizer, and Adam at the same rate (FSLA, which takes one inner step for each outer one, its own).

Quality is looked at outside of the time, after outer steps that are each a tenth more than the last; what counts is the
first of two looks in a row that are good. Seconds are CPU seconds of the process, one thread; ours are all that the
Trainer does from the start of `fit`. A library's first hypergradient is compared with ours, and how far it is off is
kept.

`--phases` compares, after the same seconds, the two phases of (FG)²U (arXiv 2406.14095, section
3.2): a cheap biased estimate, random directions, and first the one and then the other.

    python benchmarks/peers/equal_quality.py --seeds 0 1 2 3 4
    python benchmarks/peers/equal_quality.py --phases --seeds 0 1 2 3 4
    python benchmarks/peers/equal_quality.py --data-dir FOLDER_WITH_MNIST --seeds 0 1 2
    python benchmarks/peers/equal_quality.py --phases --data-dir FOLDER_WITH_MNIST --seeds 0 1 --seconds 60
    python benchmarks/peers/equal_quality.py --draw
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from lightning_bilevel import (
    FSLA,
    BilevelModule,
    Episode,
    ForwardGradient,
    HypergradientSchedule,
    HypergradientStrategy,
    TruncatedReverse,
    hypergradient,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import peers, script
from support.cleaning import (
    BATCH_SIZE,
    BETA,
    INNER_LR,
    SPARE,
    CleaningCNN,
    Clock,
    Episodes,
    Look,
    Watch,
    cnn_data,
    fit,
    validation_loss,
)
from support.peers import SAME, Loop, Task, versions
from support.results import earlier, keep, plot, to_docs

import report
from data_cleaning import SETTINGS, CleaningData, DataCleaning, Setting, accuracy_of_retrained

NAME = "equal_quality"
INNER_STEPS, FIRST_LOOK, FACTOR = 10, 5, 1.1
PEERS = {
    name: peer
    for name, peer in peers.PEERS.items()
    if peer.method != "identity" and name not in ("Betty, reverse", "by hand, Neumann", "by hand, CG")
}
"""Betty's reverse mode does not run (benchmarks/results/peers.md); the implicit loops by hand are no library's."""
HOPELESS = 0.94
"""AUROC of the weights below which no net is trained, which takes a second: none was near 93% with so bad ones."""


class Problem(NamedTuple):
    """A problem, and what is good.

    Attributes:
        module: builds it from options.
        data: of this seed.
        batch_size: examples in a batch.
        options: of the module, unless a strategy has others.
        strategies: by name.
        target: what the quality has to reach.
        quality: of a net in training and the logits; more is better.
        budget: seconds after which a run is given up.
        hopeless: AUROC of the weights below which the quality is not looked at.
    """

    module: Callable[..., Any]
    data: CleaningData
    batch_size: int
    options: Mapping[str, float]
    strategies: Mapping[str, Setting]
    target: float
    quality: Callable[[nn.Module, Tensor], float]
    budget: float
    hopeless: float = 0.0


def digits(seed: int) -> Problem:
    """Return the problem of the example, without FirstOrder, whose estimate is zero here."""
    data = CleaningData(seed=seed)
    data.setup()
    pl.seed_everything(seed, verbose=False)
    judge = DataCleaning(len(data.train))
    start = {name: value.clone() for name, value in judge.net.state_dict().items()}

    def accuracy(net: nn.Module, logits: Tensor) -> float:
        return accuracy_of_retrained(judge, start, data.train, logits, data, steps=120)

    def module(**options: Any) -> DataCleaning:
        made = DataCleaning(len(data.train), **options)
        made.net.load_state_dict(start)
        return made

    options = {"inner_steps": INNER_STEPS, "inner_lr": 1.0, "outer_lr": 0.1}
    strategies = {name: setting for name, setting in SETTINGS.items() if name != "first-order"}
    return Problem(module, data, 5000, options, strategies, 0.93, accuracy, budget=8.0, hopeless=HOPELESS)


def mnist(seed: int, data_dir: Path) -> Problem:
    data = cnn_data(data_dir, seed)
    pl.seed_everything(seed, verbose=False)
    start = CleaningCNN(len(data.train), INNER_STEPS).net.state_dict()

    def loss(net: nn.Module, logits: Tensor) -> float:
        return -validation_loss(net, data)

    def module(**options: Any) -> CleaningCNN:
        made = CleaningCNN(len(data.train), **options)
        made.net.load_state_dict(start)
        return made

    options = {"inner_steps": INNER_STEPS, "inner_lr": INNER_LR, "outer_lr": 0.1}
    strategies = {name: setting for name, setting in SETTINGS.items() if name != "first-order"}
    strategies["fsla"] = Setting(lambda: FSLA(beta=BETA, eta=0.5), {"inner_steps": 1})
    return Problem(module, data, BATCH_SIZE, options, strategies, -1.5, loss, budget=12.0)


class StepWatch(Watch):
    """Takes looks after outer steps that are each a tenth more than the last, and when the seconds are over.

    Methods that take the same steps are so looked at after the same of them, and differ in their seconds alone.
    """

    def __init__(self, budget: float, look: Look) -> None:
        super().__init__(Clock(), [budget], look)
        self.next = FIRST_LOOK

    def passed(self, step: int, logits: Tensor) -> bool:
        """Look if it is time for that; return whether to stop."""
        seconds = self.clock.seconds
        over = seconds >= self.marks[0]
        if step < self.next and not over:
            return False
        self.next = max(step + 1, round(step * FACTOR))
        return self.look(step, seconds, logits) or over


class Judge:
    """Looks at a run until the quality was good twice in a row."""

    def __init__(self, problem: Problem, net: nn.Module) -> None:
        self.problem, self.net = problem, net
        self.looks: list[tuple[int, float, float]] = []

    def __call__(self, step: int, seconds: float, logits: Tensor) -> bool:
        hopeless = binary_auroc(-logits, self.problem.data.is_wrong.long()) < self.problem.hopeless
        quality = float("-inf") if hopeless else self.problem.quality(self.net, logits)
        self.looks.append((step, seconds, quality))
        return len(self.looks) > 1 and all(quality >= self.problem.target for *_, quality in self.looks[-2:])

    def found(self) -> dict[str, Any]:
        """Return when the target was reached, or ``None``, and the best quality seen."""
        (step, seconds, quality), *_ = self.looks[-2:]
        good = len(self.looks) > 1 and min(quality, self.looks[-1][2]) >= self.problem.target
        reached = {"seconds": seconds, "steps": step} if good else {"seconds": None, "steps": None}
        best = max(look[2] for look in self.looks)
        return {**reached, "best": best if math.isfinite(best) else None}


def run_ours(problem: Problem, setting: Setting, seed: int) -> dict[str, Any]:
    """Run a strategy in a Trainer."""
    options = {**problem.options, **{k: v for k, v in setting.options.items() if k in problem.options}}
    module = problem.module(**options)
    judge = Judge(problem, module.net)
    strategy = setting.strategy()
    # FSLA wants independent samples for its products; in the others the products see the last batch, as in the peers.
    spare = SPARE if isinstance(strategy, FSLA) else 0
    episodes = Episodes(problem.data, int(options["inner_steps"]) + spare, problem.batch_size, seed)
    if len(problem.data.train) <= problem.batch_size:
        episodes.inner_batches = 1  # the whole set in every step
    fit(module, strategy, episodes, StepWatch(problem.budget, judge))
    return judge.found()


def run_peer(problem: Problem, make: Callable[[Task], Loop], seed: int) -> dict[str, Any]:
    """Run another library's loop."""
    loop = make(task(problem, partial(torch.optim.Adam, lr=problem.options["outer_lr"])))
    judge = Judge(problem, loop.net)
    episodes = Episodes(problem.data, INNER_STEPS, problem.batch_size, seed)
    train(loop, episodes, StepWatch(problem.budget, judge))
    return judge.found()


def train(loop: Loop, episodes: Episodes, watch: Watch) -> None:
    """Take outer steps until ``watch`` has seen enough."""
    for number, episode in enumerate(episodes, start=1):
        loop.step(episode)
        with watch.clock.paused():
            if watch.passed(number, loop.logits.detach()):
                return


def task(problem: Problem, outer_optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer]) -> Task:
    module = problem.module(**problem.options)
    steps, lr = int(problem.options["inner_steps"]), problem.options["inner_lr"]
    return Task(module.net, len(problem.data.train), steps, lr, outer_optimizer)


def difference(problem: Problem, name: str, seed: int = 0) -> float:
    """Return how far a library's first hypergradient is from ours, relative to ours."""
    peer = PEERS[name]
    assert peer.same_as is not None
    episode: Episode = next(iter(Episodes(problem.data, INNER_STEPS, problem.batch_size, seed)))
    given = task(problem, partial(torch.optim.SGD, lr=1.0))
    theirs = peer.make(given).hypergradient(episode)
    if name == "BOAT, Neumann":  # draws one batch more for its Hessian, and the first one follows the last
        episode = Episode([*episode.inner, episode.inner[0]], episode.outer)
    module: BilevelModule = problem.module(**problem.options)
    ours = hypergradient(module, SAME[peer.same_as](given), episode).grads["logits"]
    return float((ours - theirs).norm() / ours.norm())


def run_one(problem: Problem, name: str, seed: int) -> dict[str, Any]:
    """Run a strategy or a library; return its row, with the reason if it cannot run."""
    if name not in PEERS:
        return run_ours(problem, problem.strategies[name], seed)
    peer = PEERS[name]
    if not peer.installed:
        return {"fails": f"{peer.library} is not installed"}
    try:
        off = None if peer.same_as is None else difference(problem, name)
        return {"difference": off, **run_peer(problem, peer.make, seed)}
    except Exception as error:  # whatever another library raises is its result
        return {"fails": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def phases(problem: Problem, seed: int, budget: float) -> dict[str, dict[str, float]]:
    """Return what each phase alone and both lead to after the same seconds, half of them each."""

    def run(strategy: HypergradientStrategy) -> tuple[int, dict[str, float]]:
        module = problem.module(**problem.options)
        steps: list[int] = []

        def look(step: int, seconds: float, logits: Tensor) -> bool:
            steps.append(step)
            return False

        episodes = Episodes(problem.data, 1, problem.batch_size, seed)
        fit(module, strategy, episodes, Watch(Clock(), [budget / 2, budget], look))
        logits = module.logits.detach()
        wrong = problem.data.is_wrong.long()
        row = {
            "steps": steps[-1],
            "validation loss": validation_loss(module.net, problem.data),
            "auroc": binary_auroc(-logits, wrong).item(),
        }
        if problem.target > 0:  # the quality is an accuracy, not a loss
            row["accuracy"] = problem.quality(module.net, logits)
        return steps[0], row

    def cheap() -> HypergradientStrategy:
        return TruncatedReverse(steps=1)

    def unbiased() -> HypergradientStrategy:
        return ForwardGradient(num_directions=32)

    half, first = run(cheap())
    _, second = run(unbiased())
    _, both = run(HypergradientSchedule([(cheap(), half), (unbiased(), None)]))
    return {"phase I": first, "phase II": second, "both": both}


def run(args: argparse.Namespace) -> None:
    """Run what is asked for, saving each row as it comes."""
    settings = {"factor": FACTOR, "inner steps": INNER_STEPS, "libraries": versions()}
    for seed in args.seeds:
        problem = mnist(seed, args.data_dir) if args.data_dir else digits(seed)
        if args.seconds:
            problem = problem._replace(budget=args.seconds)
        if args.phases:
            for name, row in phases(problem, seed, problem.budget).items():
                where = "phases-mnist" if args.data_dir else "phases"
                keep(NAME, settings, {"budget": problem.budget, **row}, where, name, str(seed))
            continue
        where = "mnist" if args.data_dir else "digits"
        for name in args.methods or [*problem.strategies, *PEERS]:
            row = run_one(problem, name, seed)
            found = {"budget": problem.budget, "target": problem.target, **row}
            keep(NAME, settings, found, where, name, str(seed))
            print(where, seed, name, row, flush=True)


TITLES = {
    "digits": "Digits: to 93% cleaned accuracy",
    "mnist": "MNIST: to a validation loss of 1.5",
}


def draw() -> None:
    """Draw the seconds of every method, one dot a seed; an open one at the end of the time did not get there."""
    results = earlier(NAME)
    names = [name for name in TITLES if name in results]
    size = (5.6 * len(names), 1.6 + 0.22 * max(len(results[name]) for name in names))
    with plot(NAME, 1, len(names), size=size, squeeze=False) as (figure, panels):
        for axes, name in zip(panels[0], names, strict=True):
            panel(axes, results[name])
            axes.set_title(TITLES[name])
        figure.suptitle("Seconds until it is good: this library in blue, others in orange", x=0.01, ha="left")
    to_docs(NAME, "data_cleaning_curves_equal_quality")


def panel(axes: Any, methods: Mapping[str, Mapping[str, Any]]) -> None:
    common = set.intersection(*(set(seeds) for seeds in methods.values()))  # others are not compared with all
    ran = {
        name: [row for seed, row in seeds.items() if seed in common and "fails" not in row]
        for name, seeds in methods.items()
    }
    order = sorted((name for name in ran if ran[name]), key=lambda name: -typical(ran[name]))
    for place, name in enumerate(order):
        color = report.VERMILION if name in PEERS else report.BLUE
        for row in ran[name]:
            reached = row["seconds"] is not None
            face = color if reached else "white"
            axes.plot(row["seconds"] or row["budget"], place, "o", color=color, markerfacecolor=face, ms=5, alpha=0.8)
    axes.set_yticks(range(len(order)), order)
    axes.set(xscale="log", xlabel="CPU seconds (open: not reached by then)")
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50) if axes.get_xlim()[0] < tick < axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())


def typical(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the median over seeds, with what did not get there as later than all else."""
    seconds = sorted(row["seconds"] or 1000 * row["budget"] for row in rows)
    return seconds[len(seconds) // 2]


def main(argv: Sequence[str] | None = None) -> None:
    parser = script.options(__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with the four MNIST files; without, the digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--methods", nargs="+", help="strategies and libraries; by default all")
    parser.add_argument("--seconds", type=float, help="CPU seconds after which a run is given up")
    parser.add_argument("--phases", action="store_true", help="the two phases at equal seconds")
    parser.add_argument("--draw", action="store_true", help="only draw what is stored")
    args = script.begin(parser, argv)
    if not args.draw:
        run(args)
    if set(TITLES) & set(earlier(NAME)):
        draw()


if __name__ == "__main__":
    main()
