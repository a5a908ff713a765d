"""Newton's method for the inner level and L-BFGS for the outer one: what full batches are good for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from benchmark_utils.in_torch import Loss
from torch import Tensor

from lightning_bilevel.linear_solvers import ConjugateGradient, LinearSystem
from lightning_bilevel.tree import Params

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x to h(x) and ∇h(x)."""

ROUNDING = 1e-6
"""Relative rise of a loss that is no ascent."""


def newton(loss: Loss, z: Tensor, x: Tensor, samples: slice, tolerance: float, steps: int = 20) -> Tensor:
    """Return the minimum of ``loss`` over z: inexact Newton steps, one that ascends halved."""
    linear, step, least = ConjugateGradient(max_iter=100, tol=0.03), torch.zeros_like(z), float("inf")
    for _ in range(steps):
        at = (z + step).detach().requires_grad_()
        with torch.enable_grad():
            value = loss(at, x, samples)
            (gradient,) = torch.autograd.grad(value, at, create_graph=True)
        if float(value) > least + ROUNDING * abs(least):
            step = step / 2
            continue
        z, least = at.detach(), float(value)
        if gradient.norm() <= tolerance:
            break

        def product(v: Params, at: Tensor = at, gradient: Tensor = gradient) -> Params:
            return {"z": torch.autograd.grad(gradient, at, v["z"], retain_graph=True)[0]}

        step = -linear.solve(LinearSystem(product, {"z": gradient.detach()})).value["z"]
    return z


def quasi_newton(evaluate: Evaluate, x: Tensor, longest: float, pairs: int = 20) -> Iterator[Tensor]:
    """Yield x after each step of L-BFGS, of which no entry is longer than ``longest``; one that ascends is halved."""
    x, memory = x.detach(), deque[tuple[Tensor, Tensor]](maxlen=pairs)
    value, gradient = evaluate(x)
    step = -longest * gradient / gradient.abs().max()
    while True:
        for _ in range(10):
            after, slope = evaluate(x + step)
            if after <= value + ROUNDING * value.abs():
                break
            step = step / 2
        change = slope - gradient
        if step @ change > 1e-6 * step.norm() * change.norm():
            memory.append((step, change))
        x, value, gradient = x + step, after, slope
        yield x
        step = -inverse_hessian(memory, gradient)
        step = step * (longest / step.abs().max()).clamp(max=1)


def inverse_hessian(memory: Sequence[tuple[Tensor, Tensor]], g: Tensor) -> Tensor:
    """Return what BFGS makes of steps and of the changes of the gradient along them, times g."""
    weights = []
    for s, y in reversed(memory):
        weights.append(s @ g / (s @ y))
        g = g - weights[-1] * y
    if memory:
        s, y = memory[-1]
        g = g * (s @ y / (y @ y))
    for (s, y), weight in zip(memory, reversed(weights), strict=True):
        g = g + (weight - y @ g / (s @ y)) * s
    return g
