"""Our solver for benchopt's bilevel benchmark, on a tiny fake of what it hands to solvers; benchopt itself if there."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "benchopt"
SAMPLES, M, N = (12, 10), 4, 3


class FakeSolver:
    """What our solver uses of benchopt's base class."""

    def __init__(self, **parameters: Any) -> None:
        vars(self).update({name: values[0] for name, values in self.parameters.items()} | parameters)

    def run_once(self, calls: int) -> None:
        self.run(iter([True] * calls + [False]).__next__)


@pytest.fixture
def solver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return the class, with stand-ins for what it imports of benchopt."""
    utils, benchopt, criterion = ModuleType("benchmark_utils"), ModuleType("benchopt"), ModuleType("stopping_criterion")
    utils.__path__ = [str(FOLDER / "benchmark_utils")]
    benchopt.BaseSolver, benchopt.stopping_criterion = FakeSolver, criterion
    criterion.SufficientProgressCriterion = SimpleNamespace
    for name in [name for name in sys.modules if name.split(".")[0] in ("benchopt", "benchmark_utils")]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in [
        ("benchmark_utils", utils),
        ("benchopt", benchopt),
        ("benchopt.stopping_criterion", criterion),
    ]:
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("the_solver", FOLDER / "solvers" / "lightning_bilevel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.Solver
    for name in ("benchmark_utils.in_torch", "benchmark_utils.second_order"):
        sys.modules.pop(name, None)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    for folder in (FOLDER.parent, FOLDER):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script puts its own there
    module = importlib.import_module("run_benchopt")
    monkeypatch.setattr(importlib.import_module("support.results"), "RESULTS", tmp_path)
    return module


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def positive(generator: np.random.RandomState, count: int, size: int) -> np.ndarray:
    x = generator.randn(count, size, 2 * size)
    return x @ x.transpose(0, 2, 1) / size


def quadratic(seed: int, count: int) -> Callable[..., float]:
    """Return a function closed over its data, by the names of the benchmark; ``means`` has what it is the mean of."""
    generator = np.random.RandomState(seed)
    hess_inner, hess_outer = positive(generator, count, M), positive(generator, count, N)
    cross, linear_inner = generator.randn(count, N, M) / 4, generator.randn(count, M)
    linear_outer = generator.randn(count, N)

    def f(z: Any, x: Any, start: int = 0, batch_size: int = 1) -> float:
        part, z, x = slice(start, start + batch_size), np.asarray(z), np.asarray(x)
        each = (hess_inner[part] @ z) @ z / 2 + (hess_outer[part] @ x) @ x / 2 + (cross[part] @ z) @ x
        return float((each + linear_inner[part] @ z + linear_outer[part] @ x).mean())

    f.means = [each.mean(0) for each in (hess_inner, hess_outer, cross, linear_inner, linear_outer)]
    return f


def quadratics() -> dict[str, Any]:
    """Return what the benchmark's objective hands to a solver."""
    f_inner, f_outer = quadratic(0, SAMPLES[0]), quadratic(1, SAMPLES[1])
    return objective(f_inner, f_outer, np.ones(M), np.ones(N))


def objective(f_inner: Any, f_outer: Any, z: np.ndarray, x: np.ndarray) -> dict[str, Any]:
    start = {"inner_var0": z.astype("float32"), "outer_var0": x.astype("float32")}
    counts = {"n_inner_samples": SAMPLES[0], "n_outer_samples": SAMPLES[1]}
    return {"f_inner": f_inner, "f_outer": f_outer, **counts, **start}


def slope(given: dict[str, Any], x: np.ndarray) -> float:
    """Return ‖∇h‖ of quadratics, in closed form."""
    A, _, C, a, _ = given["f_inner"].means
    F, H, K, f, h = given["f_outer"].means
    z = -np.linalg.solve(A, C.T @ x + a)
    return float(np.linalg.norm(H @ x + K @ z + h - C @ np.linalg.solve(A, F @ z + K.T @ x + f)))


RUNS = {
    "implicit": ({"tolerance": 1e-9, "linear_tolerance": 1e-9}, 12, 1e-5),
    "reverse": ({"outer": "SGD", "outer_rate": 0.05, "n_inner_steps": 40, "step_size": 0.05}, 60, 0.1),
    "penalty": ({"outer": "SGD", "outer_rate": 0.05, "penalty": 1e4, "step_size": 0.1}, 60, 0.1),
    "amigo": ({"outer": "SGD", "outer_rate": 0.05, "batch_size": 6, "step_size": 0.05}, 60, 0.7),
    "soba": ({"outer": "SGD", "outer_rate": 0.05, "batch_size": 6, "step_size": 0.1, "period": 4}, 120, 0.3),
}
"""By strategy, parameters, outer steps, and what is left of ‖∇h‖ at most: 4.9 at the start."""


@pytest.mark.parametrize("strategy", RUNS)
def test_the_solver_goes_to_the_minimum(strategy: str, solver: Any) -> None:
    parameters, steps, left = RUNS[strategy]
    given, ours = quadratics(), solver(strategy=strategy, **parameters)
    assert ours.skip(**given) == (False, None)
    ours.set_objective(**given)
    ours.warm_up()
    ours.run(iter([True] * steps + [False]).__next__)
    found = ours.get_result()
    assert {name: (value.dtype.name, value.shape) for name, value in found.items()} == {
        "inner_var": ("float32", (M,)),
        "outer_var": ("float32", (N,)),
    }
    assert slope(given, np.ones(N)) > 2 > left > slope(given, found["outer_var"])


def test_a_step_of_the_outer_level_is_a_call(solver: Any) -> None:
    """The first call is before anything; ``eval_freq`` steps are between two."""
    ours, seen = solver(strategy="reverse", outer="SGD", outer_rate=0.1, eval_freq=3), []
    ours.set_objective(**quadratics())

    def callback() -> bool:
        seen.append(ours.get_result()["outer_var"])
        return len(seen) < 3

    ours.run(callback)
    single = solver(strategy="reverse", outer="SGD", outer_rate=0.1)
    single.set_objective(**quadratics())
    single.run(iter([True] * 6 + [False]).__next__)
    assert seen[0].tolist() == [1.0] * N
    assert len({each.tobytes() for each in seen}) == 3
    assert seen[-1].tolist() == single.get_result()["outer_var"].tolist()


def binary(part: str, dataset: Any, generator: np.random.RandomState, count: int) -> Any:
    data = {f"X_{part}": generator.randn(count, M), f"y_{part}": np.sign(generator.randn(count))}
    return closed_over(data, dataset, part, lambda z, x, X, y: np.log1p(np.exp(-y * (X @ z))))


def classes(part: str, dataset: Any, generator: np.random.RandomState, count: int) -> Any:
    data = {f"X_{part}": generator.randn(count, M), f"y_{part}": np.eye(N)[generator.randint(N, size=count)]}

    def losses(z: Any, x: Any, X: Any, y: Any) -> Any:
        logits = X @ z.reshape(M, N)
        return np.log(np.exp(logits).sum(1)) - (logits * y).sum(1)

    return closed_over(data, dataset, part, losses)


def closed_over(data: dict[str, Any], dataset: Any, part: str, losses: Any) -> Any:
    """Return a loss that has the closure of the benchmark's: X and y of ``part``, and the data set in training."""

    def value(z: Any, x: Any, X: Any, y: Any, self: Any, start: int, batch_size: int) -> float:
        rows, z, x = slice(start, start + batch_size), np.asarray(z, "float64"), np.asarray(x, "float64")
        each = losses(z, x, X[rows], y[rows])
        if self is None:
            return float(each.mean())
        if hasattr(self, "reg"):
            return float((sigmoid(x[rows]) * each).mean() + self.reg * (z**2).sum())
        rates = np.exp(x) if self.reg_parametrization == "exp" else x
        return float(each.mean() + (rates * z.reshape(-1, len(x)) ** 2).sum() / 2)

    if part == "train":
        X_train, y_train, self = data["X_train"], data["y_train"], dataset
        return lambda z, x, start=0, batch_size=1: value(z, x, X_train, y_train, self, start, batch_size)
    X_val, y_val = data["X_val"], data["y_val"]
    return lambda z, x, start=0, batch_size=1: value(z, x, X_val, y_val, None, start, batch_size)


CLASSIFIERS = {
    "a penalty for each feature": (binary, SimpleNamespace(reg_parametrization="exp"), M, M),
    "penalties as they are": (binary, SimpleNamespace(reg_parametrization="lin"), M, M),
    "a penalty for each class": (classes, SimpleNamespace(reg_parametrization="exp"), M * N, N),
    "a weight for each example": (classes, SimpleNamespace(reg=0.2), M * N, SAMPLES[0]),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_losses_of_classifiers(name: str, solver: Any) -> None:
    make, dataset, inner, outer = CLASSIFIERS[name]
    generator = np.random.RandomState(0)
    functions = [make(part, dataset, generator, count) for part, count in zip(("train", "val"), SAMPLES, strict=True)]
    z, x = generator.randn(inner), np.abs(generator.randn(outer))
    ours = solver()
    ours.set_objective(**objective(*functions, z, x))
    for loss, function in zip(ours.losses[:2], functions, strict=True):
        for rows in (slice(0, 5), slice(3, 10)):
            expected = function(z, x, start=rows.start, batch_size=rows.stop - rows.start)
            assert float(loss(torch.tensor(z), torch.tensor(x), rows)) == pytest.approx(expected, rel=1e-12)


def test_what_is_not_known_is_skipped(solver: Any) -> None:
    given = quadratics()

    def unknown(z: Any, x: Any, start: int = 0, batch_size: int = 1) -> float:
        return float(len(given))

    skipped, reason = solver().skip(**given | {"f_inner": unknown})
    assert skipped
    assert "is closed over ['given'], which no problem written here is made of" in reason


def test_another_value_is_skipped(solver: Any) -> None:
    """A function with the names of a known one that computes something else, after a change of the benchmark, say."""
    given = quadratics()
    theirs = given["f_outer"]

    def another(z: Any, x: Any, start: int = 0, batch_size: int = 1) -> float:
        return 2 * theirs(z, x, start, batch_size)

    another.__wrapped__ = theirs
    skipped, reason = solver().skip(**given | {"f_outer": another})
    assert skipped
    assert "on its last samples, and" in reason


def test_batches_are_epochs(solver: Any) -> None:
    ours = solver(strategy="soba", batch_size=5, period=4)
    ours.set_objective(**quadratics())
    episodes = ours.episodes()
    found = [next(episodes) for _ in range(8)]
    full = [0, 4]
    assert [found[step].inner for step in full] == [[slice(0, SAMPLES[0])]] * 2
    drawn = [each.inner[0] for step, each in enumerate(found) if step not in full]
    whole = [(0, 5), (5, 10), (10, 12)]
    for epoch in (drawn[:3], drawn[3:]):
        assert sorted((each.start, each.stop) for each in epoch) == whole


def test_every_solver_has_the_same_rules(script: Any) -> None:
    """Points are the rarer the later, what is measured takes no time, and runs end at the same second."""
    now = [0.0]

    class Base:
        time_iter, it, status = 0.0, 0, "running"
        solver = SimpleNamespace(get_result=lambda: 0.25)  # what it has still to do

        def log_value(self) -> None:
            now[0] += 100  # to measure
            if self.it == 40:
                raise ValueError
            points.append(self.time_iter)

    points: list[float] = []

    def ready(left: float) -> None:
        now[0] += left

    callback = script.timed(seconds=20, base=Base, ready=ready, factor=2, clock=lambda: now[0])()
    callback.start()
    while callback():
        now[0] += 0.25
    assert callback.status == "done"
    assert points == [0.25, 0.75, 1.75, 3.75, 7.75, 15.75]  # it is 40 at 20 seconds: the benchmark raises at a nan


def test_solvers_are_told_apart(script: Any) -> None:
    """Every name of ours has all parameters, also those of the others' names."""
    labels = ["SOBA", *(f"{script.OURS}, {row}" for row in ("penalty", "soba"))]
    names = ["SOBA[step_size=1]", *(f"{script.OURS}[penalty=1,period=2,strategy={row}]" for row in ("penalty", "soba"))]
    assert [script.label_of(name, labels) for name in names] == labels


def test_the_stand_in_for_mnist(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(FOLDER / "stand_ins"))
    importlib.import_module("digits").write_mnist(tmp_path / "mnist.pkl")
    found = pickle.loads((tmp_path / "mnist.pkl").read_bytes())  # noqa: S301  # ours
    assert found["training_images"].shape == (25 * 1437, 784)
    assert found["test_images"].shape == (360, 784)
    assert len(found["training_labels"]) == 25 * 1437
    seen = {image.tobytes() for image in found["training_images"]}
    assert sum(image.tobytes() in seen for image in found["test_images"]) == 0


CHECKOUT = {
    "objective.py": """
from benchopt import BaseObjective
import numpy as np


class Objective(BaseObjective):
    name = "Tiny"

    def set_data(self, functions, slope):
        self.functions, self.slope = functions, slope

    def get_one_result(self):
        return dict(inner_var=np.zeros(4), outer_var=np.zeros(3))

    def evaluate_result(self, inner_var, outer_var):
        return dict(value=self.slope(outer_var))

    def get_objective(self):
        return self.functions
""",
    "datasets/tiny.py": """
from benchopt import BaseDataset


class Dataset(BaseDataset):
    name = "tiny"

    def get_data(self):
        from tests.package import test_benchopt
        functions = test_benchopt.quadratics()
        return dict(functions=functions, slope=lambda x: test_benchopt.slope(functions, x))
""",
    "solvers/still.py": """
from benchopt import BaseSolver


class Solver(BaseSolver):
    name = "Still"
    sampling_strategy = "callback"
    parameters = {"rate": [0.1]}

    def set_objective(self, **given):
        self.given = given

    def run(self, callback):
        while callback():
            pass

    def get_result(self):
        return dict(inner_var=self.given["inner_var0"], outer_var=self.given["outer_var0"])
""",
    "benchmark_utils/__init__.py": "",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_with_benchopt(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole script on a tiny benchmark of this format."""
    pytest.importorskip("benchopt.runner", reason="benchopt is not installed")
    for name, text in CHECKOUT.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    ours = {"implicit": "tolerance=1e-9,linear_tolerance=1e-9"}
    monkeypatch.setattr(script, "PROBLEMS", {"tiny": script.Problem("tiny", 0.5, "‖∇h‖", ["Still[rate=0.2]"], ours)})
    found = script.main(["--benchmark", str(tmp_path / "checkout")])["tiny"]["solvers"]
    assert json.loads((tmp_path / "benchopt.json").read_text())["results"]["tiny"]["solvers"] == found
    assert set(found) == {"Still", "lightning_bilevel, implicit"}
    still, curve = (solver["curve"] for solver in found.values())
    assert set(still["value"]) == {still["value"][0]}
    assert curve["value"][0] == still["value"][0] > 1
    assert curve["value"][-1] < 1e-5
    assert sorted(curve["seconds"]) == curve["seconds"]
