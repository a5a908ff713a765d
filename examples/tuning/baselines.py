"""Hyperparameters without a hypergradient: search, an L1 penalty, and penalties from a formula.

>>> point, trials = random_search(lambda point: (point[0] - 2) ** 2, [(0, 4)], seconds=0.05, seed=0)
>>> bool(abs(point[0] - 2) < 0.5), trials > 10
(True, True)
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression

Objective = Callable[[Sequence[float]], float]
Ranges = Sequence[tuple[float, float]]


def random_search(objective: Objective, ranges: Ranges, seconds: float, seed: int) -> tuple[list[float], int]:
    """Return the best of points drawn uniformly until the CPU seconds are over, and how many there were."""
    generator, began = np.random.default_rng(seed), time.process_time()
    tried: list[tuple[float, list[float]]] = []
    while not tried or time.process_time() - began < seconds:
        point = [float(generator.uniform(*each)) for each in ranges]
        tried.append((finite(objective(point)), point))
    return min(tried)[1], len(tried)


def tpe(objective: Objective, ranges: Ranges, seconds: float, seed: int) -> tuple[list[float], int]:
    """Return the best point of a tree-structured Parzen estimator, which Optuna has, in as many CPU seconds."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    began = time.process_time()

    def stop(study: Any, trial: Any) -> None:
        if time.process_time() - began >= seconds:
            study.stop()

    def at(trial: Any) -> float:
        return finite(objective([trial.suggest_float(str(i), *each) for i, each in enumerate(ranges)]))

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(at, callbacks=[stop])
    return [study.best_params[str(i)] for i in range(len(ranges))], len(study.trials)


def finite(value: float) -> float:
    """Return the value; a large one where a run has diverged."""
    return value if np.isfinite(value) else 1e6


SEARCHES: dict[str, Callable[[Objective, Ranges, float, int], tuple[list[float], int]]] = {
    "random search": random_search,
    **({"TPE": tpe} if importlib.util.find_spec("optuna") else {}),
}
"""From a name to a function of an objective, ranges, CPU seconds and a seed; TPE where Optuna is installed."""


def by_relevance(x: Any, y: np.ndarray) -> Callable[[float, float], np.ndarray]:
    """Return a function from a level and a power to penalties (p,): exp(level) · (F_j / its geometric mean)^−power.

    F_j is the F value of an analysis of variance of feature j between the classes: features that say nothing of the
    class are penalized more.

    Args:
        x: (n, p), examples to train on.
        y: (n,), their labels.
    """
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Features .* are constant", UserWarning)  # which say nothing either
        values = np.nan_to_num(f_classif(x, y)[0], nan=0.0) + 1e-3
    relative = values / np.exp(np.log(values).mean())
    return lambda level, power: np.clip(np.exp(level) * relative**-power, 1e-7, 5.0)


def l1(train: Any, strength: float) -> LogisticRegression:
    """Return a logistic regression with an L1 penalty, of ``strength`` times the sum of absolute weights.

    Args:
        train: with ``x`` and ``y``.
        strength: beside the mean cross-entropy.
    """
    options = {"l1_ratio": 1.0, "solver": "saga", "max_iter": 300, "tol": 1e-3, "random_state": 0}
    return LogisticRegression(C=1 / (strength * len(train.y)), **options).fit(train.x, train.y)
