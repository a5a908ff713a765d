"""What is the time spent on?

Five things whose totals other benchmarks show, taken apart:

* `directions`: one more direction of `ForwardGradient` beside the inner run, on a convolutional net with and without
  batch norm (`cost_against_directions`);
* `recomputation`: an inner step of `FirstOrder()`, of `ReverseUnroll()` and of `ReverseUnroll("sqrt")` on a perceptron
  (`long_runs`), and on the CNN without batch norm;
* `sinusoids`: a meta-step of MAML in a Trainer (`maml_speed`);
* `trainer`: an outer step by hand, in a LightningModule and as a `BilevelModule` (`trainer_overhead`);
* `compiled`: an outer step in a Trainer with `compile=True`, of those two problems of `against_jax` that compute least.

The first three by operator, with torch.profiler: the time within an operator and in no other that it calls, by kind.
Every run calls the same operators in the same order, so that of each the fastest of the repeats counts. What the whole
takes more than that, without the profiler, is spent outside of operators: in Python. One direction, or one inner step,
is the difference of two runs, over the number of them that one has more. The arithmetic is counted, too: the
floating-point operations of convolutions and matrix products.

The other two by function, with timers around a few of Lightning and of this library; a part has what no other part
within it takes; of all steps, the mean over the fastest tenth. CPU seconds of one thread, in turns. What has been
measured of the other parts before is kept.

    python benchmarks/cost/where_time_goes.py
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytorch_lightning as pl
import torch
from cost_against_directions import CASES
from pytorch_lightning.loops.optimization.automatic import Closure
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from trainer_overhead import WARM_UP, ByHand, fitted, looped, problems

from lightning_bilevel import (
    FirstOrder,
    ForwardGradient,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    hypergradient,
)
from lightning_bilevel.compiled.evaluation import Evaluation
from lightning_bilevel.compiled.program import Part
from lightning_bilevel.compiled.watch import Watch
from lightning_bilevel.linear_solvers import Neumann
from lightning_bilevel.training.fit import Fit
from lightning_bilevel.training.own_numbers import OwnNumbers

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.curves import PLAIN
from support.few_shot_problems import sinusoids as meta_learning
from support.fits import Stopwatch
from support.measure import least_seconds
from support.penalties import LR, TERMS, penalties
from support.problems import NETS, episodes, module, plain_run
from support.results import ORANGE, PURPLE, SKY, keep, plot

import report

NAME = "where_time_goes"
DEEP = {"perceptron": NETS["MLP"], "CNN": CASES["CNN, no norm"]}
"""The nets whose inner runs are made again."""

KINDS = {
    "convolutions": ("(?i)conv", report.BLUE),
    "matrix products": (r"::(add|ba|badd)?(b|m)mm?$|::linear|matmul|::(add)?mv$|::dot$", SKY),
    "batch norm": (r"batch_norm|BatchNorm|^_Backward", report.VERMILION),
    "element-wise": (
        r"::(mul|add|sub|rsub|div|neg|addcmul|addcdiv|pow|sqrt|rsqrt|lerp|sigmoid|tanh|relu|threshold|clamp_min|exp)",
        ORANGE,
    ),
    "reductions and losses": (r"::(sum|mean|var|norm|linalg|_?log_softmax|nll_|mse_|isfinite|all|max|min)", PURPLE),
    "memory": (r"^aten::", report.GREEN),
    "autograd": (r"^autograd::|Backward|AccumulateGrad|GraphRoot", "#F0E442"),
}
"""By a pattern of the operator's name; the first that fits. Other events are Python's."""
WHOLE = ("convolutions", "batch norm")
"""Have all that is called within them."""
PYTHON = "outside of operators"

HYPERGRADIENT, ADAM, LIGHTNING, LOG = "the hypergradient", "Adam", "Lightning", "self.log"
GRAPHS, GUARDS = "compiled graphs", "whether they hold"
AROUND, STEP, SURROGATE = "ours, around the estimate", "ours, the rest of the step", "ours, the surrogate's backward"
COLORS = {kind: color for kind, (_, color) in KINDS.items()} | {PYTHON: report.GREY}
PARTS = {
    GRAPHS: report.GREEN, GUARDS: "#F0E442",
    HYPERGRADIENT: report.BLUE, ADAM: SKY, LIGHTNING: report.GREY, LOG: "#B0B0B0",
    AROUND: report.VERMILION, STEP: ORANGE, SURROGATE: PURPLE,
}  # fmt: skip

TITLES = {
    "directions": "A CNN: three inner steps, and one direction more",
    "recomputation": "A perceptron 784-256-10, and a CNN: an inner step",
    "sinusoids": "MAML, 25 sinusoids: a meta-step in a Trainer",
    "trainer": "MAML, 25 sinusoids: an outer step, by function",
    "compiled": "An outer step with compile=True, by function",
}

Times = dict[str, float]


class Bar(NamedTuple):
    """What is taken apart: a run, or what it does more than a lesser one, over a number.

    Attributes:
        run: the run.
        lesser: a run that does less.
        divisor: what the difference is divided by.
    """

    run: Callable[[], Any]
    lesser: Callable[[], Any] | None = None
    divisor: int = 1

    def difference(self, of: Callable[[Callable[[], Any]], float]) -> float:
        """Return what a function of runs gives for this."""
        return (of(self.run) - (of(self.lesser) if self.lesser else 0)) / self.divisor


def directions(few: int = 1, many: int = 7, inner_steps: int = 3) -> dict[str, Bar]:
    bars = {}
    for name, text in (("CNN", "batch norm"), ("CNN, no norm", "no norm")):
        (episode,), problem = episodes(CASES[name], 1), module(CASES[name], inner_steps)
        more, fewer = (partial(hypergradient, problem, ForwardGradient(b, chunk_size=b), episode) for b in (many, few))
        bars[f"{PLAIN}, {text}"] = Bar(partial(plain_run, problem, episode))
        bars[f"a direction, {text}"] = Bar(more, fewer, many - few)
    return bars


def recomputation(depth: int) -> dict[str, Bar]:
    strategies = {
        "FirstOrder()": FirstOrder(),
        "ReverseUnroll()": ReverseUnroll(),
        'ReverseUnroll("sqrt")': ReverseUnroll("sqrt"),
    }
    bars, half = {}, depth // 2
    for text, net in DEEP.items():
        (episode,), more, fewer = episodes(net, 1), module(net, depth), module(net, half)
        for name, strategy in strategies.items():
            run, lesser = (partial(hypergradient, problem, strategy, episode) for problem in (more, fewer))
            bars[f"{name}, {text}"] = Bar(run, lesser, depth - half)
    return bars


def by_operator(bars: Mapping[str, Bar], repeats: int) -> dict[str, Any]:
    """Return the milliseconds of each bar by kind, and its floating-point operations."""
    runs = {id(run): run for bar in bars.values() for run in (bar.run, bar.lesser) if run}
    seconds = least_seconds({str(key): run for key, run in runs.items()}, repeats)
    kinds = {key: within_operators(partial(repeated, run, repeats)) for key, run in runs.items()}
    found = {}
    for name, bar in bars.items():
        total = bar.difference(lambda run: 1000 * seconds[str(id(run))])
        parts = {kind: bar.difference(lambda run, kind=kind: kinds[id(run)][kind]) for kind in KINDS}
        found[name] = {"ms": total, "by kind": with_python(total, parts), "Mflop": bar.difference(megaflops)}
    return found


def repeated(run: Callable[[], Any], repeats: int) -> Iterable[profile]:
    """Return profiles of one run after the other."""
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            run()
        yield profiler


def within_operators(profiles: Callable[[], Iterable[profile]]) -> Times:
    """Return milliseconds by kind; of each operator in its place, the fastest of the profiles."""
    names: list[str] = []
    kinds: list[str] = []
    fastest = np.zeros(0)
    for profiler in profiles():
        events = profiler.events()
        times = np.array([event.self_cpu_time_total / 1000 for event in events])
        if not names:
            names, fastest = [event.name for event in events], times
            kinds = [kind_of(event) for event in events]
        elif [event.name for event in events] == names:
            fastest = np.minimum(fastest, times)
    return {kind: float(fastest[[each == kind for each in kinds]].sum()) for kind in KINDS}


def kind_of(event: Any) -> str:
    """Return the kind of an operator, or of the operator that has called it where that has all within it."""
    caller = event
    while caller is not None and not caller.name.startswith("autograd::engine"):
        for kind in WHOLE:
            if re.search(KINDS[kind][0], caller.name):
                return kind
        caller = caller.cpu_parent
    others = (kind for kind, (pattern, _) in KINDS.items() if kind not in WHOLE and re.search(pattern, event.name))
    return next(others, PYTHON)


def with_python(total: float, parts: Times) -> Times:
    """Add what the whole takes more than its parts."""
    return {**parts, PYTHON: max(0.0, total - sum(parts.values()))}


def megaflops(run: Callable[[], Any]) -> float:
    """Count the floating-point operations of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops()) / 1e6


class Profiles(pl.Callback):
    """Profiles each step of a fit; without the loader."""

    def __init__(self) -> None:
        self.profiles: list[profile] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.profiles.append(profile(activities=[ProfilerActivity.CPU]))
        self.profiles[-1].start()

    def on_train_batch_end(self, *_: Any) -> None:
        self.profiles[-1].stop()


def sinusoids(repeats: int, steps: int) -> dict[str, Any]:
    """Return the milliseconds of a meta-step by kind."""
    stopwatch, profiles = Stopwatch(), Profiles()
    for callback, count in ((stopwatch, steps), (profiles, repeats)):
        torch.manual_seed(0)
        learner, loader = meta_learning()
        batches: DataLoader = DataLoader([next(iter(loader))] * (count + WARM_UP), batch_size=None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You defined a `validation_step`")  # and no data for it: so it is meant
            fitted(learner, batches, [ReverseUnroll(), callback])
    total = 1000 * min(stopwatch.seconds)
    parts = within_operators(lambda: profiles.profiles[WARM_UP:])
    return {"a meta-step of MAML": {"ms": total, "by kind": with_python(total, parts)}}


class Clock(pl.Callback):
    """CPU seconds of the parts of each step: a part does not count what other parts within it take."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []
        self._inside, self._now, self._since = [LIGHTNING], Counter[str](), time.process_time()

    def _charge(self) -> None:
        now = time.process_time()
        self._now[self._inside[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that charges its time to a part."""

        @wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            self._charge()
            self._inside.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._inside.pop()

        return charged

    def on_train_batch_start(self, *_: Any) -> None:
        self._charge()
        self.steps.append(self._now)
        self._now = Counter()


TIMED: list[tuple[Any, str, str]] = [
    (ReverseUnroll, "estimate", HYPERGRADIENT),
    (ByHand, "backward", HYPERGRADIENT),
    (torch.optim.Adam, "step", ADAM),
    (torch.optim.Adam, "zero_grad", ADAM),
    (Closure, "__call__", LIGHTNING),
    (ByHand, "log", LOG),
    (OwnNumbers, "log", LOG),
    (pl.LightningModule, "backward", SURROGATE),
    (Fit, "output", STEP),
    (Fit, "estimate", AROUND),
]
"""What is timed, and as which part. Adam's step calls the closure, and that what the training step consists of."""

COMPILED: list[tuple[Any, str, str]] = [
    *TIMED,
    (ImplicitGradient, "estimate", HYPERGRADIENT),
    (Part, "__call__", GRAPHS),
    *((Evaluation, method, GRAPHS) for method in ("__call__", "product", "terms")),
    (Watch, "look", GUARDS),
]


def charged_steps(
    timed: Sequence[tuple[Any, str, str]], fit: Callable[[Clock], None], clock: Clock | None = None
) -> list[Counter[str]]:
    """Return the seconds of each step of a fit, but for the first ones, by part."""
    clock = clock or Clock()
    with ExitStack() as stack:
        for owner, method, part in timed:
            stack.enter_context(patch.object(owner, method, clock.timed(part, getattr(owner, method))))
        fit(clock)
    return clock.steps[WARM_UP + 1 :]  # what is charged at a start belongs to the step before


def by_part(every: Sequence[Counter[str]]) -> dict[str, Any]:
    """Return the milliseconds of the fastest steps, and those of their parts."""
    fastest = sorted(every, key=lambda step: step.total())[: max(1, len(every) // 10)]
    own = {part: 1000 * sum(step[part] for step in fastest) / len(fastest) for part in PARTS}
    return {"ms": 1000 * sum(step.total() for step in fastest) / len(fastest), "by part": own}


def trainer(rounds: int, steps: int) -> dict[str, Any]:
    """Return the milliseconds of an outer step by part; of the loop by hand, as a whole."""
    problem = problems()["small"]
    loader: DataLoader = DataLoader([problem.batch] * (steps + WARM_UP), batch_size=None)
    taken: dict[str, list[Counter[str]]] = {"by hand": [], "in a LightningModule": [], "BilevelModule": []}
    for _ in range(rounds):
        starts = looped(problem.make(), problem, loader)[WARM_UP:]
        taken["by hand"] += [Counter({"": float(seconds)}) for seconds in np.diff(starts)]
        clock = Clock()
        by_hand = ByHand(problem._replace(by_hand=clock.timed(HYPERGRADIENT, problem.by_hand)))
        fit = partial(fitted, by_hand, loader)
        taken["in a LightningModule"] += charged_steps(TIMED, lambda clock, fit=fit: fit([clock]), clock)
        ours = partial(fitted, problem.make(), loader)
        taken["BilevelModule"] += charged_steps(TIMED, lambda clock, fit=ours: fit([ReverseUnroll(), clock]))
    found = {name: by_part(every) for name, every in taken.items()}
    del found["by hand"]["by part"]
    return found


def compiled(rounds: int, steps: int) -> dict[str, Any]:
    """Return the milliseconds of an outer step of two small problems, by part."""

    def maml() -> tuple[Any, Any]:
        torch.manual_seed(0)
        module, loader = meta_learning()
        return module, next(iter(loader))

    cases: dict[str, tuple[Callable[[], tuple[Any, Any]], Callable[[], HypergradientStrategy]]] = {
        "MAML, 25 sinusoids": (maml, ReverseUnroll),
        "implicit gradient, 22 numbers": (penalties, lambda: ImplicitGradient(Neumann(TERMS, step_size=LR))),
    }
    found = {}
    for name, (make, strategy) in cases.items():
        every: list[Counter[str]] = []
        for _ in range(rounds):
            learner, batch = make()
            learner.compiles_steps = True
            loader: DataLoader = DataLoader([batch] * (10 * steps + WARM_UP), batch_size=None)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "You defined a `validation_step`")  # and no data for it: as is meant
                fit, own = partial(fitted, learner, loader), strategy()
                every += charged_steps(COMPILED, lambda clock, fit=fit, own=own: fit([own, clock]))
        found[name] = by_part(every)
    return found


def show(name: str, found: Mapping[str, Any]) -> None:
    rows = [
        [part, *(f"{split(row)[part]:.3f}" if part in split(row) else "" for row in found.values())]
        for part in parts(found)
    ]
    rows.append(["in all", *(f"{row['ms']:.2f}" for row in found.values())])
    if any("Mflop" in row for row in found.values()):
        rows.append(["Mflop", *(f"{row['Mflop']:.1f}" for row in found.values())])
    report.print_table(f"{name}: CPU milliseconds", ["", *found], rows)


def parts(found: Mapping[str, Any]) -> list[str]:
    """Return the parts that are not nothing in all of some bars."""
    return [part for part in (*COLORS, *PARTS) if any(split(row).get(part, 0) > 5e-4 for row in found.values())]


def split(row: Mapping[str, Any]) -> Times:
    return row.get("by kind") or row.get("by part") or {}


def draw(results: Mapping[str, Any]) -> None:
    heights = [len(found) + 1.5 for found in results.values()]
    size = (9.5, 0.5 * sum(heights) + 0.4)
    with plot(NAME, len(results), 1, size=size, height_ratios=heights, squeeze=False) as (_, panels):
        for axes, (name, found) in zip(panels[:, 0], results.items(), strict=True):
            left = np.zeros(len(found))
            for part in parts(found):
                widths = np.array([max(0.0, split(row).get(part, 0.0)) for row in found.values()])
                color = {**COLORS, **PARTS}[part]
                axes.barh(list(found), widths, left=left, color=color, label=part, height=0.62)
                left += widths
            ends = np.maximum(left, [row["ms"] for row in found.values()])
            for place, row in enumerate(found.values()):
                if not split(row):  # of the loop by hand there is only the whole
                    axes.barh(place, row["ms"], color="white", edgecolor=report.GREY, height=0.62)
                axes.text(ends[place], place, f"  {row['ms']:.1f} ms", va="center")
            axes.set(title=TITLES[name], xlim=(0, 1.2 * ends.max()))
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", left=False)
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8.5, handlelength=1, labelspacing=0.25)
        panels[-1][0].set_xlabel("CPU milliseconds")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--parts", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--repeats", type=int, default=8, help="of each run, and of each profile (%(default)s)")
    parser.add_argument("--depth", type=int, default=32, help="inner steps of the recomputation (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="outer steps in a turn (%(default)s)")
    args = script.begin(parser, argv)
    measured: dict[str, Callable[[], dict[str, Any]]] = {
        "directions": lambda: by_operator(directions(), args.repeats),
        "recomputation": lambda: by_operator(recomputation(args.depth), args.repeats),
        "sinusoids": lambda: sinusoids(args.repeats, args.steps),
        "trainer": lambda: trainer(args.repeats, args.steps),
        "compiled": lambda: compiled(args.repeats, args.steps),
    }
    results: dict[str, Any] = {}
    for name in args.parts:
        found = measured[name]()
        show(name, found)
        settings = {"repeats": args.repeats, "depth": args.depth, "steps": args.steps}
        results = keep(NAME, settings, found, name, order=TITLES)
    draw(results)
    return results


if __name__ == "__main__":
    main()
