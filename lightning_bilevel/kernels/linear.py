"""Linear layers: with a weight for every episode, or every direction, one batched product.

Inside ``vmap`` PyTorch makes a product, a sum and several views of such a layer, and each of them again in every
derivative, which is what a small net spends its time on. Outside of it large layers are computed by oneDNN on the CPUs
on which that is faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bilevel.kernels.onednn import is_faster, is_large, product

NATIVE = F.linear
BY_ONEDNN = is_faster()
_functorch = torch._C._functorch


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what ``torch.nn.functional.linear`` returns, and sooner if ``vmap`` goes over ``weight``, or by oneDNN.

    Shapes, of one member: ``input`` ``(*, in)``, ``weight`` ``(out, in)``, ``bias`` ``(out,)``.
    """
    if torch.compiler.is_dynamo_compiling():  # which follows no levels of transforms
        return NATIVE(input, weight, bias)
    if not torch._C._are_functorch_transforms_active():
        if BY_ONEDNN and _is_plain(input, weight):
            rows, columns = input.reshape(-1, weight.shape[1]), weight.t()
            if is_large(rows, columns):
                outputs = product(rows, columns)
                outputs = outputs if bias is None else outputs + bias
                return outputs.view(*input.shape[:-1], len(weight))
        return NATIVE(input, weight, bias)
    if bias is None:
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


def _is_plain(input: Tensor, weight: Tensor) -> bool:
    """Return whether a layer is computed as it is and nothing watches: no trace, no cast, no forward AD."""
    if torch.autograd.forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu"):
        return False
    usual = type(input) in (Tensor, nn.Parameter) and type(weight) in (Tensor, nn.Parameter) and weight.dim() == 2
    return usual and input.shape[-1:] == weight.shape[-1:]


def _batched(value: Tensor, level: int) -> bool:
    """Return whether the innermost transform is a ``vmap`` over this tensor."""
    return _functorch.is_batchedtensor(value) and _functorch.maybe_get_level(value) == level


def _members(value: Tensor) -> Tensor:
    """Return the tensor that ``vmap`` goes over, its members along the first dimension."""
    dimension = _functorch.maybe_get_bdim(value)
    unwrapped: Tensor = _functorch.get_unwrapped(value)
    return unwrapped.movedim(dimension, 0) if dimension else unwrapped
