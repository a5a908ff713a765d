"""Losses and an activation that lack a formula in PyTorch: forward AD of their backward pass, or a second derivative.

- The mean of ``mse_loss`` fails where its gradient has no tangent of its own ("ZeroTensors are immutable").
- The backward passes of ``huber_loss`` and ``soft_margin_loss`` have no forward AD.
- ``hardsigmoid`` has neither a second derivative nor forward AD of its backward pass.

Each is written with operations that have all; what they stand in for is below ``torch.nn.functional``, which takes care
of arguments and weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

OWNER: Any = torch._C._nn
"""Where ``torch.nn.functional`` looks these functions up."""

NATIVE_MSE = OWNER.mse_loss
NONE, MEAN, SUM = range(3)


def mse_loss(input: Tensor, target: Tensor, reduction: int = MEAN) -> Tensor:
    """Return the squared differences, or their mean or sum."""
    return _reduced(NATIVE_MSE(input, target, NONE), reduction)


def huber_loss(input: Tensor, target: Tensor, reduction: int = MEAN, delta: float = 1.0) -> Tensor:
    """Return δ times the smooth L1 losses with β = δ."""
    each: Tensor = delta * OWNER.smooth_l1_loss(input, target, NONE, delta)
    return _reduced(each, reduction)


def soft_margin_loss(input: Tensor, target: Tensor, reduction: int = MEAN) -> Tensor:
    """Return log(1 + exp(−target · input)), which does not overflow here."""
    return _reduced(-F.logsigmoid(target * input), reduction)


def hardsigmoid(input: Tensor) -> Tensor:
    """Return min(max(x + 3, 0), 6) / 6."""
    return F.relu6(input + 3) / 6


def _reduced(each: Tensor, reduction: int) -> Tensor:
    return each.mean() if reduction == MEAN else each.sum() if reduction == SUM else each
