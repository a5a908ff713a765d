"""Few-shot learning without an outer level: a Gaussian process, features of a classifier, prototypes, neighbours.

All see the training tasks, or the training classes, as the meta-learners do, and then the support set of a task.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Kernel
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch import Tensor, nn

from lightning_bilevel import Episode

NOISE = 1e-4
"""Added to the diagonal of a kernel's matrix, for points that nearly coincide."""


def fitted(tasks: Sequence[Episode]) -> Kernel:
    """Return the kernel of smooth functions, an amplitude times a Gaussian, under which all tasks are most likely."""
    kernel = ConstantKernel(1.0, (1e-3, 1e3)) * RBF(1.0, (0.1, 10.0))
    processes = [
        process(kernel, torch.cat([x, x_query]), torch.cat([y, y_query])) for ((x, y),), (x_query, y_query) in tasks
    ]

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        both = [each.log_marginal_likelihood(theta, eval_gradient=True) for each in processes]
        return -sum(value for value, _ in both), -sum(gradient for _, gradient in both)

    return kernel.clone_with_theta(minimize(loss, kernel.theta, jac=True, method="L-BFGS-B", bounds=kernel.bounds).x)


def process(kernel: Kernel, x: Tensor, y: Tensor) -> GaussianProcessRegressor:
    """Return a process of this kernel that has seen the points."""
    return GaussianProcessRegressor(kernel, alpha=NOISE, optimizer=None).fit(x.double().numpy(), y.double().numpy())


def squared_error(kernel: Kernel, task: Episode) -> float:
    """Return the error on the query points, of the process that has seen the support points."""
    ((x, y),), (x_query, y_query) = task
    predicted = process(kernel, x, y).predict(x_query.double().numpy())
    return float(np.square(predicted.reshape(-1) - y_query.flatten().numpy()).mean())


def classifier(net: nn.Module, x: Tensor, y: Tensor, seconds: float, seed: int, batch: int = 64) -> nn.Module:
    """Train a net to tell all training classes apart, for so many CPU seconds; return its body.

    Args:
        net: a body and a head, whose outputs are as many as there are classes.
        x: (n, ...), all images of the training classes.
        y: (n,), from 0 to the number of classes.
        seconds: of CPU.
        seed: of the batches.
        batch: images in one.
    """
    generator, began = torch.Generator().manual_seed(seed), time.process_time()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    while time.process_time() - began < seconds:
        index = torch.randint(len(y), (batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x[index]), y[index]).backward()
        optimizer.step()
    return net.body


HEADS: dict[str, Callable[[], object]] = {
    "ridge": lambda: RidgeClassifier(alpha=1.0),
    "prototypes": lambda: NearestCentroid(),
    "nearest neighbour": lambda: KNeighborsClassifier(1),
}
"""What is fitted to the features, or to the pixels, of a support set."""


@torch.no_grad()
def accuracy(features: Callable[[Tensor], Tensor], head: str, task: Episode) -> float:
    """Return the share of query examples that a head tells right, fitted to the support set."""
    ((x, y),), (x_query, y_query) = task
    support, query = (F.normalize(features(each).flatten(1), dim=1).numpy() for each in (x, x_query))
    with warnings.catch_warnings():
        # Prototypes ask for the deviations within classes: of pixels that are always empty, of one example of a class.
        warnings.filterwarnings("ignore", ".*(zero standard deviation|invalid value encountered in divide)")
        return float(HEADS[head]().fit(support, y.numpy()).score(query, y_query.numpy()))


def scores(tasks: Sequence[Episode], training: Sequence[Episode]) -> dict[str, list[float]]:
    """Return, for what learns a task from its support set alone, the score on each task.

    That is a Gaussian process where targets are numbers, its kernel fitted to ``training``, and heads on the inputs as
    they are where they are classes.
    """
    if tasks[0].outer[1].is_floating_point():
        kernel = fitted(training)
        return {"Gaussian process": [squared_error(kernel, task) for task in tasks]}
    return {f"pixels, {head}": [accuracy(nn.Identity(), head, task) for task in tasks] for head in HEADS}
