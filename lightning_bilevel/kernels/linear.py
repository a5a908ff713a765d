"""Linear layers that have a weight for every episode, or every direction: one batched product.

Inside ``vmap`` PyTorch makes a product, a sum and several views of such a layer, and each of them again in every
derivative, which is what a small net spends its time on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NATIVE = F.linear
_functorch = torch._C._functorch


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what ``torch.nn.functional.linear`` returns; faster where ``vmap`` goes over ``weight``.

    Shapes, of one member: ``input`` ``(*, in)``, ``weight`` ``(out, in)``, ``bias`` ``(out,)``.
    """
    if bias is None or not torch._C._are_functorch_transforms_active():
        return NATIVE(input, weight, bias)
    level = _functorch.current_level()
    usual = weight.dim() == 2 and bias.dim() == 1 and input.shape[-1] == weight.shape[-1]
    if not usual or not (_batched(weight, level) and _batched(bias, level)):
        return NATIVE(input, weight, bias)
    weights, biases = _members(weight), _members(bias)
    inputs = _members(input) if _batched(input, level) else input.expand(len(weights), *input.shape)
    rows = inputs if inputs.dim() == 3 else inputs.flatten(1, -2) if inputs.dim() > 2 else inputs.unsqueeze(1)
    outputs = torch.baddbmm(biases.unsqueeze(1), rows, weights.transpose(1, 2))
    outputs = outputs if inputs.dim() == 3 else outputs.view(*inputs.shape[:-1], outputs.shape[-1])
    wrapped: Tensor = _functorch._add_batch_dim(outputs, 0, level)
    return wrapped


def _batched(value: Tensor, level: int) -> bool:
    """Return whether the innermost transform is a ``vmap`` over this tensor."""
    return _functorch.is_batchedtensor(value) and _functorch.maybe_get_level(value) == level


def _members(value: Tensor) -> Tensor:
    """Return the tensor that ``vmap`` goes over, its members along the first dimension."""
    dimension = _functorch.maybe_get_bdim(value)
    unwrapped: Tensor = _functorch.get_unwrapped(value)
    return unwrapped.movedim(dimension, 0) if dimension else unwrapped
