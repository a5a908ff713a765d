"""Hyperparameters that are numbers, tensors or mappings, and arithmetic that is shortest for each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_bilevel.errors import value_error
from lightning_bilevel.inner_optimizers.base import Hyperparameter, PerStep
from lightning_bilevel.tree import Params

Value = float | Tensor
"""A hyperparameter at one parameter: patterns are resolved."""


def check(owner: str, argument: str, value: Any, below: float = math.inf) -> None:
    """Check the Python numbers of a hyperparameter; tensors pass unread, so that nothing waits for a device.

    Args:
        owner: class name, for the message.
        argument: argument name, for the message.
        value: the hyperparameter.
        below: numbers must be in ``[0, below)``.

    Raises:
        ValueError: a number is out of range, or ``value`` is no hyperparameter.

    >>> check("SGD", "lr", {"bias": 0.1, "*": torch.tensor(-1.0)})
    """
    if isinstance(value, (float, int)):
        if 0 <= value < below:
            return
    elif isinstance(value, Tensor):
        return
    elif isinstance(value, PerStep):
        if not isinstance(value.values, Tensor):
            for position, item in enumerate(value.values):
                check(owner, f"{argument} at step {position + 1}", item, below)
        return
    elif isinstance(value, Mapping):
        for pattern, item in value.items():
            if isinstance(item, Mapping):
                raise value_error(f"{owner}({argument}[{pattern!r}]=...)", "a number or a tensor", item)
            check(owner, f"{argument}[{pattern!r}]", item, below)
        return
    expected = "a non-negative number" if below == math.inf else f"a number in [0, {below:g})"
    raise value_error(f"{owner}({argument}=...)", expected, value)


def check_betas(owner: str, betas: Sequence[Hyperparameter]) -> tuple[Hyperparameter, Hyperparameter]:
    """Return the pair β1, β2, after a check that there are two and that their numbers are in [0, 1).

    >>> check_betas("Adam", (0.9, 0.999))
    (0.9, 0.999)
    """
    if len(betas) != 2:
        raise value_error(f"{owner}(betas=...)", "a pair", betas)
    for position, beta in enumerate(betas):
        check(owner, f"betas[{position}]", beta, below=1)
    return betas[0], betas[1]


def without_decay(weight_decay: Hyperparameter) -> bool:
    """Return whether a weight decay is the number 0 everywhere.

    >>> without_decay({"*.bias": 0, "*": 0.1})
    False
    """
    values = weight_decay.values() if isinstance(weight_decay, Mapping) else (weight_decay,)
    return all(is_number(value, 0) for value in values)


def decoupled(lr: Value, weight_decay: Value, is_decoupled: bool) -> tuple[Value, Value]:
    """Return the multiple of θ that a weight decay adds to the gradient, and the factor by which θ shrinks.

    >>> decoupled(0.5, 0.25, False), decoupled(0.5, 0.25, True)
    ((0.25, 1.0), (0.0, 0.875))
    """
    return (0.0, 1 - lr * weight_decay) if is_decoupled else (weight_decay, 1.0)


def resolve(owner: str, argument: str, value: Hyperparameter, params: Params) -> list[Value]:
    """Return the hyperparameter of each parameter, in the order of ``params``.

    Args:
        owner: class name, for the message.
        argument: argument name, for the message.
        value: the hyperparameter; of the patterns of a mapping the first that matches wins.
        params: the parameters, keyed by name.

    Raises:
        ValueError: no pattern matches a name, or a tensor does not broadcast to the parameter's shape.

    >>> resolve("SGD", "lr", {"*.bias": 0.1, "*": 0.2}, {"0.weight": torch.ones(2), "0.bias": torch.ones(2)})
    [0.2, 0.1]
    """
    if isinstance(value, (float, int)):
        return [value] * len(params)
    if isinstance(value, Tensor):
        return [_fit(owner, argument, name, value, param) for name, param in params.items()]
    assert not isinstance(value, PerStep), "an update takes the value of its step before"
    patterns = tuple(value)
    values = []
    for (name, param), pattern in zip(params.items(), _first_matches(patterns, tuple(params)), strict=True):
        if pattern is None:
            expected = f"a mapping with a pattern for the inner parameter {name!r}"
            hint = 'A last pattern "*" matches the rest.'
            raise value_error(f"{owner}({argument}=...)", expected, list(patterns), hint)
        matched = value[pattern]
        assert not isinstance(matched, PerStep)
        values.append(_fit(owner, argument, name, matched, param))
    return values


def is_number(value: Hyperparameter, number: float) -> bool:
    """Return whether ``value`` is this Python number; a tensor or a mapping is not, whatever is in it.

    >>> is_number(0, 0.0), is_number(torch.tensor(0.0), 0.0)
    (True, False)
    """
    return isinstance(value, (float, int)) and value == number


def add_scaled(a: Tensor, b: Tensor, factor: Value, value: float = 1.0) -> Tensor:
    """Return ``a + value * factor * b``, or ``a`` itself if ``factor`` is the number 0.

    >>> add_scaled(torch.ones(2), torch.ones(2), torch.tensor([1.0, 2.0]))
    tensor([2., 3.])
    """
    if isinstance(factor, Tensor):
        return torch.addcmul(a, b, factor, value=value)
    return a if factor == 0 else torch.add(a, b, alpha=value * factor)


def add_ratio(a: Tensor, numerator: Tensor, denominator: Tensor, factor: Value, value: float = 1.0) -> Tensor:
    """Return ``a + value * factor * numerator / denominator``.

    >>> add_ratio(torch.ones(1), torch.ones(1), torch.full((1,), 2.0), 3.0)
    tensor([2.5000])
    """
    if isinstance(factor, Tensor):
        return torch.addcmul(a, numerator / denominator, factor, value=value)
    return torch.addcdiv(a, numerator, denominator, value=value * factor)


def average(old: Tensor, new: Tensor, weight: Value) -> Tensor:
    """Return ``old + weight * (new - old)``.

    >>> average(torch.zeros(1), torch.ones(1), 0.25)
    tensor([0.2500])
    """
    if isinstance(weight, Tensor):  # not lerp, whose tensor weight has to have the dtype of the rest
        return torch.addcmul(old, new - old, weight)
    return torch.lerp(old, new, weight)


def safe_sqrt(square: Tensor) -> Tensor:
    """Return the square root, with derivative 0 where ``square`` is 0.

    There the chain rule would give inf · 0 = nan. ``clamp_min`` selects instead of multiplying, so it cuts every order
    of derivative off. The smallest normal number has a root (1e-154 in float64, 1e-19 in float32) that is lost
    when an optimizer's ``eps`` is added: values do not change.

    >>> square = torch.zeros(1, requires_grad=True)
    >>> torch.autograd.grad(safe_sqrt(square).sum(), square)
    (tensor([0.]),)
    """
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


def root_plus(square: Tensor, floor: Value) -> Tensor:
    """Return ``safe_sqrt(square) + floor``, with a graph that holds no tensor but this one.

    Autograd would hold ``square`` and its root as well, of every parameter in every inner step. Inside function
    transforms, which take a graph for each call and drop it, that does not matter, and plain operations are faster.

    >>> square = torch.tensor([0.0, 4.0], requires_grad=True)
    >>> torch.autograd.grad(root_plus(square, 0.5).sum(), square)
    (tensor([0.0000, 0.2500]),)
    """
    if isinstance(floor, Tensor) or torch._C._are_functorch_transforms_active():
        return safe_sqrt(square) + floor
    root: Tensor = _RootPlus.apply(square, floor)
    return root


class _RootPlus(torch.autograd.Function):
    """y = √x + floor, with the derivative 1 / 2 (y - floor).

    Where the root is far below ``floor``, the difference has few digits or none, and so has the derivative. It does not
    matter: what an optimizer divides by y changes there with x by less than with the numerator, in the ratio of the
    root to ``floor``. The lost digits are beyond the last one of the sum.
    """

    @staticmethod
    def forward(ctx: Any, square: Tensor, floor: float) -> Tensor:
        y = safe_sqrt(square).add_(floor)
        ctx.floor = floor
        ctx.save_for_backward(y)
        ctx.save_for_forward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return grads[0] / _twice_the_root(y, ctx.floor), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (y,) = ctx.saved_tensors
        return tangents[0] / _twice_the_root(y, ctx.floor)


def _twice_the_root(y: Tensor, floor: float) -> Tensor:
    """Return 2 (y - floor), but infinity where that root is the least one or lost: every derivative is 0 there."""
    least = math.sqrt(torch.finfo(y.dtype).tiny)
    return torch.threshold(y - floor, least, math.inf).mul_(2)


@torch.compiler.assume_constant_result  # Dynamo does not follow ``fnmatch``
def _first_matches(patterns: tuple[str, ...], names: tuple[str, ...]) -> tuple[str | None, ...]:
    return _matched(patterns, names)


@lru_cache(maxsize=256)
def _matched(patterns: tuple[str, ...], names: tuple[str, ...]) -> tuple[str | None, ...]:
    return tuple(next((p for p in patterns if fnmatchcase(name, p)), None) for name in names)


def _fit(owner: str, argument: str, name: str, value: Value, param: Tensor) -> Value:
    """Return ``value`` such that arithmetic with it keeps the shape, dtype and device of ``param``."""
    if not isinstance(value, Tensor):
        return value
    if value.ndim:
        trailing = zip(reversed(value.shape), reversed(param.shape), strict=False)
        if value.ndim > param.ndim and value.numel() == 1:
            value = value.reshape(())
        elif value.ndim > param.ndim or any(size not in (1, wanted) for size, wanted in trailing):
            expected = f"a tensor that broadcasts to {tuple(param.shape)}, the shape of {name!r}"
            raise value_error(f"{owner}({argument}=...)", expected, tuple(value.shape))
    # A 0-dim tensor does not change the dtype of others, and a beta of 0.999 would be 1 in bfloat16.
    if value.device != param.device or (value.dtype != param.dtype and (value.ndim or not param.ndim)):
        return value.to(param)
    return value
