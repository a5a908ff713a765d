"""The benchmark's own measure against time, of this library and of the solvers of benchopt's bilevel benchmark.

What `benchopt run` does on a checkout of https://github.com/benchopt/benchmark_bilevel, with this library's solver
(`solvers/lightning_bilevel.py`) beside the checkout's own. Those have the rates that `config/` has for such data, or
those of their files where these are missing or diverge. The data sets are run as they are; what they would download
is made by scikit-learn in the same shape (`stand_ins/`).

- Quadratic: ‖∇h‖², 512 samples on each level, 100 inner and 10 outer parameters.
- Penalties: ‖∇h‖² of a logistic regression of 22 features with a penalty each, 49,990 and 91,701 examples.
- Cleaning: the share of errors on 5,000 digits after training on 20,000 weighted ones, of which half have any label.

Time: CPU seconds of the process, one thread, without compilation (a first call) and without what is measured at the
points of the curve, which are the farther from each other the later. What JAX has still to do when it returns is waited
for, as benchopt does not. Every solver ends at the same second.

    pip install benchopt jax jaxopt scikit-learn
    python benchmarks/benchopt/run_benchopt.py --benchmark FOLDER [--problems quadratic penalties cleaning]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent / "stand_ins"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.results import PURPLE, SKY, keep, plot

import report

NAME = "benchopt"
HERE = Path(__file__).parent
PARTS = ("solvers", "benchmark_utils")
ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "JAX_PLATFORMS": "cpu",
}
OURS = "lightning_bilevel"


class Problem(NamedTuple):
    """What is run.

    Attributes:
        dataset: of the benchmark, with its parameters.
        seconds: for each solver.
        measure: what the curve shows.
        theirs: solvers with the rates of the benchmark.
        ours: arguments of our solver, by the name of a row.
    """

    dataset: str
    seconds: float
    measure: str
    theirs: Sequence[str]
    ours: dict[str, str]


PROBLEMS = {
    "quadratic": Problem(
        "simulated[n_samples_inner=512,n_samples_outer=512,dim_inner=100,dim_outer=10]",
        2,
        "‖∇h‖²",
        [
            "SABA[step_size=0.1,outer_ratio=1.0,eval_freq=64]",
            "SRBA[step_size=0.1,outer_ratio=1.0,period_frac=0.5,eval_freq=64]",
            "SOBA[step_size=0.1,outer_ratio=1.0,eval_freq=64]",
            "FSLA[step_size=0.1,outer_ratio=1.0,eval_freq=64]",
            "AmIGO[step_size=0.01,outer_ratio=0.1,n_inner_steps=10,eval_freq=16]",
            "StocBiO[step_size=0.1,outer_ratio=1.0,n_inner_steps=10,n_shia_steps=10,eval_freq=16]",
        ],
        {
            "implicit": "precision=float32,tolerance=1e-6,linear_tolerance=1e-5",
            "soba": "outer=SGD,outer_rate=0.1,batch_size=64,step_size=0.1,period=8,precision=float32",
            "amigo": "outer=SGD,outer_rate=0.1,batch_size=64,step_size=0.01,precision=float32",
            "penalty": "outer=Adam,outer_rate=0.1,batch_size=64,penalty=10.0,precision=float32",
        },
    ),
    "penalties": Problem(
        "ijcnn1",
        3,
        "‖∇h‖²",
        [
            "SABA[step_size=0.25,outer_ratio=1.0,eval_freq=1024]",
            "SRBA[step_size=0.5,outer_ratio=1.0,period_frac=0.5,eval_freq=1024]",
            "SOBA[step_size=0.1,outer_ratio=1.0,eval_freq=1024]",
            "AmIGO[step_size=0.125,outer_ratio=0.1,n_inner_steps=10,eval_freq=256]",
            "StocBiO[step_size=0.25,outer_ratio=1.0,n_inner_steps=10,n_shia_steps=10,eval_freq=256]",
            "jaxopt_GD[inner_solver=lbfgs,step_size_outer=10,n_inner_steps=100]",
        ],
        {
            "implicit": "tolerance=1e-5",
            "soba": "outer=Adam,outer_rate=0.1,batch_size=4096,step_size=0.5,period=20",
            "amigo": "outer=Adam,outer_rate=0.1,batch_size=4096,step_size=0.5",
            "penalty": "outer=Adam,outer_rate=0.1,batch_size=4096,step_size=0.5,penalty=10.0",
        },
    ),
    "cleaning": Problem(
        "mnist[ratio=0.5]",
        4,
        "share of errors on validation",
        [
            "SABA[step_size=0.1,outer_ratio=0.001,eval_freq=4]",
            "SRBA[step_size=0.001,outer_ratio=1e-05,period_frac=512.0,eval_freq=16]",
            "SOBA[step_size=1.0,outer_ratio=0.0001,eval_freq=16]",
            "AmIGO[step_size=0.001,outer_ratio=1e-06,n_inner_steps=10,eval_freq=8]",
            "StocBiO[step_size=0.01,outer_ratio=1e-05,n_inner_steps=10,n_shia_steps=10,eval_freq=8]",
            "MRBO[step_size=0.1,outer_ratio=0.0001,n_shia_steps=10,eta=0.5,eval_freq=8]",
        ],
        {
            "implicit": "precision=float32,tolerance=1e-2,linear_tolerance=1e-1,outer_rate=2.0",
            "amigo": "outer=Adam,outer_rate=0.3,batch_size=1024,step_size=0.01,precision=float32",
            "penalty": "outer=Adam,outer_rate=0.3,batch_size=1024,step_size=0.01,penalty=10.0,precision=float32",
        },
    ),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; return the curves by problem and solver."""
    parser = script.options(__doc__)
    parser.add_argument("--benchmark", type=Path, required=True, help="a checkout of benchmark_bilevel")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--seconds", type=float, help="for each solver, in place of those of the problem")
    args = script.begin(parser, argv)
    os.environ.update(ONE_THREAD)
    results = {}
    with assembled(args.benchmark.resolve()) as folder:
        for name in args.problems:
            problem = PROBLEMS[name]
            seconds = args.seconds or problem.seconds
            found = {"seconds": seconds, "measure": problem.measure, "solvers": run(folder, problem, seconds)}
            results = keep(NAME, {"threads": 1}, found, name, order=PROBLEMS)
    draw(results)
    return results


@contextmanager
def assembled(benchmark: Path) -> Iterator[Path]:
    """Yield a folder with links to a checkout's files and to ours."""
    from digits import write_mnist

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for part in (*PARTS, "datasets"):
            (folder / part).mkdir()
            for path in [*(benchmark / part).glob("*.py"), *(HERE / part).glob("*.py")]:
                (folder / part / path.name).symlink_to(path)
        (folder / "objective.py").symlink_to(benchmark / "objective.py")
        write_mnist(folder / "mnist.pkl")
        yield folder


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Have another working directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(folder: Path, problem: Problem, seconds: float) -> dict[str, Any]:
    """Return the curve of each solver."""
    import jax
    import pandas
    from benchopt import runner

    ours = {f"{OURS}, {row}": f"{OURS}[strategy={row},{arguments}]" for row, arguments in problem.ours.items()}
    solvers = {name.split("[")[0]: name for name in problem.theirs} | ours
    output = folder / f"{problem.dataset.split('[')[0]}.parquet"
    plain, runner._Callback = runner._Callback, timed(seconds, runner._Callback, jax.block_until_ready)
    try:
        with inside(folder):  # the benchmark looks for its data there
            runner.run_benchmark(
                folder,
                list(solvers.values()),
                dataset_names=[problem.dataset],
                max_runs=10**9,
                timeout=10**9,
                plot_result=False,
                no_cache=True,
                output_file=str(output),
            )
    finally:
        runner._Callback = plain
    found = {label_of(name, solvers): (name, rows) for name, rows in pandas.read_parquet(output).groupby("solver_name")}
    return {label: {"solver": found[label][0], "curve": curve(found[label][1])} for label in solvers if label in found}


def label_of(name: str, labels: Iterable[str]) -> str:
    """Return the label of a solver that benchopt names with all its parameters."""
    kinds = {label: label.split(", ") for label in labels}
    return next(
        label
        for label, (solver, *rows) in kinds.items()
        if name.split("[")[0] == solver and all(f"strategy={row}" in name for row in rows)
    )


def curve(table: Any) -> dict[str, list[float]]:
    """Return the columns of benchopt's table that tell: seconds, measures, and how often the callback was called."""
    found = {"seconds": table["time"].tolist(), "calls": table["stop_val"].tolist()}
    for name in ("objective_value", "objective_value_func", "objective_func", "objective_test_accuracy"):
        if name in table:
            found[name.removeprefix("objective_")] = table[name].astype(float).tolist()
    return found


def timed(
    seconds: float,
    base: type,
    ready: Callable[[Any], Any],
    factor: float = 1.5,
    clock: Callable[[], float] = time.process_time,
) -> type:
    """Return a callback of benchopt that has the same rules for all solvers.

    Args:
        seconds: after which the next call ends a run.
        base: benchopt's.
        ready: returns when a result is there: JAX is not done when it returns, and benchopt's own clock stops then.
        factor: of the times of two points of the curve.
        clock: that counts.
    """

    class Callback(base):
        def start(self) -> None:
            self.due = 0.0
            ready(self.solver.get_result())  # of a first call
            self.time_callback = clock()

        def __call__(self) -> bool:
            ready(self.solver.get_result())
            self.time_iter += clock() - self.time_callback
            over = self.time_iter >= seconds
            if over or self.time_iter >= self.due:
                self.due = max(self.due + 0.01, factor * self.time_iter)
                try:
                    self.log_value()
                except ValueError:  # the benchmark's, at nan: the curve ends before
                    over = True
            self.status = "done" if over else "running"
            self.it += 1
            self.time_callback = clock()
            return not over

    return Callback


def draw(results: dict[str, Any]) -> None:
    """Draw the curves: ours in colours, theirs in greys and dashes."""
    colors = dict(
        zip(("implicit", "soba", "amigo", "penalty"), (report.BLUE, report.VERMILION, PURPLE, SKY), strict=True)
    )
    dashes = ["-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)), (0, (3, 3))]
    with plot(NAME, len(results), 1, size=(8, 3.6 * len(results)), squeeze=False) as (_, panels):
        for panel, (name, found) in zip(panels[:, 0], results.items(), strict=True):
            others = iter(dashes)
            for label, solver in found["solvers"].items():
                row = label.split(", ")[-1]
                points = solver["curve"]["seconds"], solver["curve"]["value"]
                if label.startswith(OURS):
                    panel.plot(*points, color=colors[row], label=label, linewidth=2.5, zorder=3)
                else:
                    panel.plot(*points, color=report.GREY, linestyle=next(others), label=label, linewidth=1.3)
            panel.set(title=name.capitalize(), xlabel="CPU seconds", ylabel=found["measure"], xscale="log")
            panel.set(yscale="log", xlim=(0.01, found["seconds"]))
            panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    main()
