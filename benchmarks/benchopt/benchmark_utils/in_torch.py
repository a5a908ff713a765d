"""The problems of benchopt's bilevel benchmark in PyTorch, on the data that their functions in JAX are closed over.

The benchmark hands a solver two functions of JAX, f(inner_var, outer_var, start, batch_size), and no data. What they
are closed over is read here, the same loss is written in PyTorch, and whether both have one value is looked at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, slice], Tensor]
"""(z, x, samples) to their mean loss: z is the benchmark's inner variable, x its outer one."""


class UnknownProblemError(ValueError):
    """A function of the benchmark that is none of those written here."""


class Problem(NamedTuple):
    """A bilevel problem in PyTorch.

    Attributes:
        inner: g.
        outer: f.
        samples: how many g has, and f.
    """

    inner: Loss
    outer: Loss
    samples: tuple[int, int]


def in_torch(f_inner: Any, f_outer: Any, samples: tuple[int, int], z: Tensor, x: Tensor) -> Problem:
    """Return the problem of two functions of the benchmark, in the dtype of z.

    Args:
        f_inner: theirs.
        f_outer: theirs.
        samples: how many each has.
        z: some inner variable.
        x: some outer variable.

    Raises:
        UnknownProblemError: a function that is not known here, or one that has another value than what is made of it.
    """
    problem = Problem(loss_of(f_inner, z.dtype), loss_of(f_outer, z.dtype), samples)
    for ours, theirs, count in zip((problem.inner, problem.outer), (f_inner, f_outer), samples, strict=True):
        size = min(8, count)
        expected = float(theirs(z.float().numpy(), x.float().numpy(), start=count - size, batch_size=size))
        found = float(ours(z, x, slice(count - size, count)))
        if not np.isclose(found, expected, rtol=1e-3, atol=1e-5):
            raise UnknownProblemError(f"`{theirs}` is {expected} on its last samples, and {found} in PyTorch.")
    return problem


def tensor(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=dtype)


def loss_of(function: Any, dtype: torch.dtype) -> Loss:
    """Return a loss in PyTorch on the data that a function of the benchmark is closed over."""
    data = dict(inspect.getclosurevars(inspect.unwrap(function)).nonlocals)
    dataset = data.pop("self", None)
    if data.keys() >= set(QUADRATIC):
        return quadratic(*(tensor(data[name], dtype) for name in QUADRATIC))
    for part in ("train", "val"):
        if data.keys() >= {f"X_{part}", f"y_{part}"}:
            x, y = (tensor(data[f"{name}_{part}"], dtype) for name in "Xy")
            return classifier(x, y, penalty_of(dataset, part))
    raise UnknownProblemError(f"`{function}` is closed over {sorted(data)}, which no problem written here is made of.")


QUADRATIC = ("hess_inner", "hess_outer", "cross", "linear_inner", "linear_outer")


def quadratic(A: Tensor, B: Tensor, C: Tensor, a: Tensor, b: Tensor) -> Loss:
    """Return ½ zᵀAz + ½ xᵀBx + xᵀCz + aᵀz + bᵀx, with the means over the samples in place of A, B, C, a and b."""

    def loss(z: Tensor, x: Tensor, samples: slice) -> Tensor:
        of_z = mean(A[samples]) @ z / 2 + mean(a[samples])
        of_x = mean(B[samples]) @ x / 2 + mean(C[samples]) @ z + mean(b[samples])
        return z @ of_z + x @ of_x

    return loss


def mean(values: Tensor) -> Tensor:
    """Return the mean over the first dimension: as a product, in half of the time of ``values.mean(0)``."""
    weights = torch.full((len(values),), 1 / len(values), dtype=values.dtype)
    return (weights @ values.flatten(1)).view(values.shape[1:])


Penalized = Callable[[Tensor, Tensor, Tensor, slice], Tensor]
"""(losses of the samples, z, x, samples) to the loss."""


def penalty_of(dataset: Any, part: str) -> Penalized:
    """Return what the training loss of a data set of the benchmark makes of the losses of samples."""
    if part == "val":
        return lambda losses, z, x, samples: losses.mean()
    if hasattr(dataset, "reg"):  # data cleaning: a weight for each sample
        return lambda losses, z, x, samples: (x[samples].sigmoid() * losses).mean() + dataset.reg * z.square().sum()
    rates = (lambda x: x) if dataset.reg_parametrization == "lin" else torch.exp
    return lambda losses, z, x, samples: losses.mean() + (rates(x) * z.reshape(-1, len(x)).square()).sum() / 2


def classifier(X: Tensor, y: Tensor, penalized: Penalized) -> Loss:
    """Return the loss of a logistic regression, of labels −1 and 1 or, where y has columns, of classes."""
    if y.ndim == 1:
        signed = X * y[:, None]
        return lambda z, x, samples: penalized(F.softplus(-(signed[samples] @ z)), z, x, samples)
    labels = y.argmax(1)

    def loss(z: Tensor, x: Tensor, samples: slice) -> Tensor:
        logits = X[samples] @ z.reshape(X.shape[1], y.shape[1])
        return penalized(F.cross_entropy(logits, labels[samples], reduction="none"), z, x, samples)

    return loss
