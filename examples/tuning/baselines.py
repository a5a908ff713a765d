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
from scipy.sparse.linalg import svds
from scipy.special import softmax
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression

Objective = Callable[[Sequence[float]], float]
Ranges = Sequence[tuple[float, float]]


def random_search(
    objective: Objective, ranges: Ranges, seconds: float, seed: int, first: Sequence[float] | None = None
) -> tuple[list[float], int]:
    """Return the best of points drawn uniformly until the CPU seconds are over, and how many there were.

    Args:
        objective: what is to be small.
        ranges: of each entry of a point.
        seconds: of CPU.
        seed: of what is drawn.
        first: a point that is tried before all others.
    """
    generator, began = np.random.default_rng(seed), time.process_time()
    tried: list[tuple[float, list[float]]] = []
    while not tried or time.process_time() - began < seconds:
        drawn = [float(generator.uniform(*each)) for each in ranges]
        point = list(first) if first is not None and not tried else drawn
        tried.append((finite(objective(point)), point))
    return min(tried)[1], len(tried)


def tpe(
    objective: Objective, ranges: Ranges, seconds: float, seed: int, first: Sequence[float] | None = None
) -> tuple[list[float], int]:
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
    if first is not None:
        study.enqueue_trial({str(i): value for i, value in enumerate(first)})
    study.optimize(at, callbacks=[stop])
    return [study.best_params[str(i)] for i in range(len(ranges))], len(study.trials)


def finite(value: float) -> float:
    """Return the value; a large one where a run has diverged."""
    return value if np.isfinite(value) else 1e6


SEARCHES: dict[str, Callable[..., tuple[list[float], int]]] = {
    "random search": random_search,
    **({"TPE": tpe} if importlib.util.find_spec("optuna") else {}),
}
"""From a name to a function of what `random_search` is one of; TPE where Optuna is installed."""


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


def l1(train: Any, strength: float, iterations: int = 1000, tolerance: float = 1e-4) -> LogisticRegression:
    """Return a logistic regression with an L1 penalty, of ``strength`` times the sum of absolute weights.

    FISTA (Beck and Teboulle, SIAM J. Imaging Sciences, 2009) with restarts: on sparse features far faster than the
    solvers of scikit-learn that take this penalty.

    Args:
        train: with ``x``, dense or sparse, and ``y``.
        strength: beside the mean cross-entropy.
        iterations: at most.
        tolerance: it stops where no weight moves by more than this share of the largest one.
    """
    x, (classes, y) = train.x, np.unique(train.y, return_inverse=True)
    largest = svds(x, k=1, return_singular_vectors=False, random_state=0)[0] / np.sqrt(len(y))
    targets, rate = np.eye(len(classes))[y], 1 / largest**2  # the bias has a feature that is `largest` everywhere
    w = np.zeros((x.shape[1] + 1, len(classes)))
    ahead, momentum = w, 1.0
    for _ in range(iterations):
        excess = softmax(x @ ahead[:-1] + largest * ahead[-1], axis=1) - targets
        gradient = np.vstack([x.T @ excess, largest * excess.sum(0)]) / len(y)
        new = ahead - rate * gradient
        new[:-1] = np.sign(new[:-1]) * np.maximum(np.abs(new[:-1]) - rate * strength, 0)
        if np.vdot(ahead - new, new - w) > 0:
            momentum = 1.0
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        moved = new - w
        ahead, w, momentum = new + (momentum - 1) / following * moved, new, following
        if np.abs(moved).max() <= tolerance * np.abs(new).max():
            break
    model = LogisticRegression()
    model.classes_, model.coef_, model.intercept_ = classes, w[:-1].T, largest * w[-1]
    if len(classes) == 2:
        model.coef_, model.intercept_ = (each[1:] - each[:1] for each in (model.coef_, model.intercept_))
    return model
