"""How do times and memory of this checkout compare with those of another one, as of the commit before a change?

Small programs that use what is public alone, so that they run on both: MAML on sinusoids, by `hypergradient` and in a
Trainer; a linear net at T = 100; example weights of a perceptron at T = 20 (FSLA: one step) with six strategies; MAML
with a convolutional net; and the peak memory of reverse mode at T = 100. That both compute a gradient of the same
length is checked first.

Each checkout has two processes with its path in PYTHONPATH. All four take turns, and only one of them runs at a time:
CPU seconds of one thread, the least of all calls. `after / before` is the ratio of the two checkouts; `spread` is how
far two processes of the same checkout are apart, so that a ratio nearer to 1 than that says nothing. Memory is the peak
of a process forked for it, before anything is timed. `--quick` takes a minute or two and prints only.

    python benchmarks/cost/against_before.py --before PATH
    python benchmarks/cost/against_before.py --before PATH --quick --only sinusoid
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import lightning_bilevel
from lightning_bilevel import (
    FSLA,
    PZOBO,
    Episode,
    ForwardGradient,
    GammaGreedy,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    hypergradient,
)
from lightning_bilevel.linear_solvers import Neumann

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.fits import Stopwatch, fit
from support.measure import peak, turns
from support.problems import NETS, RATE, Maml, Net, episodes, module, perceptron_net, sinusoids
from support.results import commit, keep

import report

NAME = "against_before"
HERE = Path(__file__).parents[2]
SIDES = ("before", "after")
LENGTH = "change of the gradient's length"
WORKER = "--worker"
Run = Callable[[], Any]


def weighted(net: Net, inner_steps: int, strategy: HypergradientStrategy, num_weights: int = 1000) -> Run:
    start = "warm" if isinstance(strategy, FSLA) else "reset"
    problem, (episode,) = module(net, inner_steps, num_weights, inner_start=start), episodes(net, 1, num_weights)
    return partial(hypergradient, problem, strategy, episode)


def maml(count: int) -> Run:
    learner, tasks = sinusoids(count)
    return partial(hypergradient, learner, ReverseUnroll(), tasks)


def maml_of_images(count: int = 4) -> Run:
    torch.manual_seed(0)
    net, generator = NETS["CNN"], torch.Generator().manual_seed(0)
    tasks = [Episode([net.draw(25, generator)], net.draw(15, generator)) for _ in range(count)]
    return partial(hypergradient, Maml(net.make(), F.cross_entropy, 5), ReverseUnroll(), tasks)


def maml_in_a_trainer(steps: int = 20, warm_up: int = 2) -> Run:
    """Return a fit that returns the seconds of its fastest step, from its start to that of the next."""

    def run() -> float:
        learner, tasks = sinusoids(25)
        stopwatch, data = Stopwatch(), DataLoader([tasks] * (steps + warm_up), batch_size=None)  # type: ignore[arg-type]
        with report.screen():
            fit(learner, data, ReverseUnroll(), stopwatch, max_epochs=1)
        return min(b - a for a, b in pairwise(stopwatch.starts[warm_up:]))

    return run


LINEAR, SMALL, LARGE = (perceptron_net(*sizes, examples=100) for sizes in ((64, 22), (64, 128, 10), (784, 256, 10)))
CLEANING: dict[str, HypergradientStrategy] = {
    "ReverseUnroll()": ReverseUnroll(),
    "ForwardGradient(16)": ForwardGradient(16),
    "ImplicitGradient(Neumann(10))": ImplicitGradient(Neumann(10, step_size=RATE)),
    "GammaGreedy()": GammaGreedy(),
    "PZOBO(4)": PZOBO(4),
    "FSLA()": FSLA(),
}
TIMED: dict[str, Callable[[], Run]] = {
    "MAML, 25 sinusoids": partial(maml, 25),
    "MAML, 1 sinusoid": partial(maml, 1),
    "MAML, 25 sinusoids, in a Trainer": maml_in_a_trainer,
    "linear, T = 100, ReverseUnroll()": partial(weighted, LINEAR, 100, ReverseUnroll()),
    'linear, T = 100, ReverseUnroll("sqrt")': partial(weighted, LINEAR, 100, ReverseUnroll("sqrt")),
    **{
        f"cleaning, {name}": partial(weighted, SMALL, 1 if isinstance(strategy, FSLA) else 20, strategy)
        for name, strategy in CLEANING.items()
    },
    "MAML, 4 tasks, a CNN": maml_of_images,
}
"""What makes each program; a call of one takes its time, or returns it."""
HELD = {"peak MiB, T = 100, ReverseUnroll()": partial(weighted, LARGE, strategy=ReverseUnroll())}
"""Whose memory is measured: from T to a program."""


# --- In a process of its own ---


def answer(made: dict[str, Run], name: str, seconds: float) -> Any:
    """Return the length of a program's gradient at its first call, its least seconds at others; or its memory."""
    if name in HELD:
        return peak(HELD[name](inner_steps=100), HELD[name](inner_steps=1))
    if name not in made:
        made[name] = TIMED[name]()
        grads = getattr(made[name](), "grads", {})
        return sum(float(grad.square().sum()) for grad in grads.values()) ** 0.5
    least, began = float("inf"), time.process_time()
    while least == float("inf") or time.process_time() - began < seconds:
        start = time.process_time()
        found = made[name]()
        least = min(least, found if isinstance(found, float) else time.process_time() - start)
    return least


def work() -> None:
    """Answer what comes in, a line each; what others print goes to the errors."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    made: dict[str, Run] = {}
    replies.write(f"{lightning_bilevel.__file__}\n")
    replies.flush()
    for line in sys.stdin:
        replies.write(json.dumps(answer(made, *json.loads(line))) + "\n")
        replies.flush()


class Worker:
    """A process that has the package of a checkout."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", __file__, WORKER]
        self.process = Popen(command, env=environment, stdin=PIPE, stdout=PIPE, text=True)

    def check(self) -> None:
        """Raise unless the package that it has is that of the checkout."""
        found = self._line()
        if not Path(found).is_relative_to(self.checkout):
            raise RuntimeError(f"Expected the package of {self.checkout} but got {found}")

    def ask(self, name: str, seconds: float = 0.0) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, seconds]) + "\n")
        self.process.stdin.flush()
        return float(json.loads(self._line()))

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError("A process ended; what it said is above.")
        return line

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # closes its input, which ends it


# --- And in this one ---


def row(found: Mapping[str, Sequence[float]], **more: Any) -> dict[str, Any]:
    """Return the least of each checkout, their ratio, and how far processes of the same checkout are apart."""
    before, after = (min(found[side]) for side in SIDES)
    spread = max(max(found[side]) / min(found[side]) for side in SIDES) - 1
    return {"before": before, "after": after, "after / before": after / before, "spread": spread, **more}


def measured(name: str, workers: Mapping[str, Sequence[Worker]], repeats: int, seconds: float) -> dict[str, Any]:
    first = {side: [worker.ask(name) for worker in workers[side]] for side in SIDES}
    if name in HELD:
        return row(first, unit="MiB")
    by_turn = [(side, k) for k in range(len(workers["before"])) for side in SIDES]  # the checkouts take turns
    *_, best = islice(turns({f"{s} {k}": partial(workers[s][k].ask, name, seconds) for s, k in by_turn}), repeats)
    lengths = [first[side][0] for side in SIDES]
    change = lengths[1] / lengths[0] - 1 if lengths[0] else None
    least = {side: [value for key, value in best.items() if key.startswith(side)] for side in SIDES}
    return row(least, unit="s", **{LENGTH: change})


def show(name: str, found: Mapping[str, Any]) -> None:
    factor, unit = (1000, "ms") if found["unit"] == "s" else (1, "MiB")
    values = " ".join(f"{factor * found[side]:10.2f}" for side in SIDES)
    change = found.get(LENGTH)
    gradient = "" if change is None else f"{change:10.0e}" if change else "      same"
    ratio, spread = found["after / before"], found["spread"]
    print(f"{name:40s} {values} {unit:3s} {ratio:14.3f} {spread:8.3f} {gradient}", flush=True)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--before", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument("--only", nargs="+", default=[""], help="programs with one of these words; others are kept")
    parser.add_argument("--repeats", type=int, default=10, help="turns of each process (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="CPU seconds of a turn, or one call (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="of each checkout (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="short turns, and nothing is written")
    args = script.begin(parser, argv)
    if args.quick:
        args.repeats, args.seconds = 2, 0.05
    checkouts = {"before": args.before.resolve(), "after": HERE}
    chosen = [name for name in (*HELD, *TIMED) if any(word in name for word in args.only)]
    settings = {key: getattr(args, key) for key in ("repeats", "seconds", "processes")}
    settings |= {f"commit {side}": commit(checkouts[side]) for side in SIDES}
    rows: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        workers = {
            side: [stack.enter_context(Worker(checkout)) for _ in range(args.processes)]
            for side, checkout in checkouts.items()
        }
        for worker in (*workers["before"], *workers["after"]):
            worker.check()
        print(f"{'':40s} {'before':>10s} {'after':>10s}     {'after / before':>14s} {'spread':>8s} {'gradient':>10s}")
        for name in chosen:
            rows[name] = measured(name, workers, args.repeats, args.seconds)
            show(name, rows[name])
            if not args.quick:
                keep(NAME, settings, rows[name], name, order=[*HELD, *TIMED])
    return rows


if __name__ == "__main__":
    work() if sys.argv[1:] == [WORKER] else main()
