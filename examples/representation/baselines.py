"""Representations without two levels: the inputs as they are, or body and head trained together.

>>> x = torch.arange(6.0).view(6, 1)
>>> pair = x, 2 * x.flatten()
>>> round(ridge(pair, pair, pair)["test_loss"], 4)
0.0
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
ALPHAS = tuple(10.0**power for power in range(-6, 5))


def ridge(inner: Pair, outer: Pair, test: Pair) -> dict[str, float]:
    """Return half the mean squared errors of a ridge regression on the inputs.

    Its penalty is the one with which a fit to the inner examples has the least error on the outer ones; then it is
    fitted to both.
    """
    (x, y), (x_outer, y_outer), (x_test, y_test) = (
        [part.double().numpy() for part in pair] for pair in (inner, outer, test)
    )

    def error(model: Ridge, inputs: np.ndarray, targets: np.ndarray) -> float:
        return float(np.square(model.predict(inputs) - targets).mean() / 2)

    fits = [Ridge(alpha).fit(x, y) for alpha in ALPHAS]
    errors = [error(fit, x_outer, y_outer) for fit in fits]
    best = int(np.argmin(errors))
    both = fits[best].fit(np.concatenate([x, x_outer]), np.concatenate([y, y_outer]))
    return {"outer_loss": errors[best], "test_loss": error(both, x_test, y_test)}


def jointly(
    net: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Tensor, Tensor], Tensor],
    examples: Pair,
    batch_size: int,
    seconds: float,
    seed: int,
) -> int:
    """Train body and head together by Adam, on the examples of both levels; return the steps taken.

    Args:
        net: from inputs to outputs.
        parameters: of body and head.
        loss: of outputs and targets.
        examples: of both levels.
        batch_size: of each step.
        seconds: of CPU, as many as the two levels had.
        seed: of the batches.
    """
    (x, y), generator = examples, torch.Generator().manual_seed(seed)
    optimizer, steps, began = torch.optim.Adam(parameters, lr=1e-3), 0, time.process_time()
    while time.process_time() - began < seconds:
        index = torch.randint(len(y), (batch_size,), generator=generator)
        optimizer.zero_grad()
        loss(net(x[index]), y[index]).backward()
        optimizer.step()
        steps += 1
    return steps
