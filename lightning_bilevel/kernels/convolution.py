"""Convolutions with a short double backward.

PyTorch's own makes the gradients of inputs that need none, which images do not, and that of the weight for more places
than the kernel has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

NATIVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

Numbers = int | Sequence[int]
Geometry = tuple[Any, ...]
"""Stride, padding, dilation, whether it is transposed, output padding, groups."""


def conv1d(*args: Any, **kwargs: Any) -> Tensor:
    """Return what ``torch.nn.functional.conv1d`` returns, with a faster second derivative."""
    return _convolution(1, *args, **kwargs)


def conv2d(*args: Any, **kwargs: Any) -> Tensor:
    """Return what ``torch.nn.functional.conv2d`` returns, with a faster second derivative."""
    return _convolution(2, *args, **kwargs)


def conv3d(*args: Any, **kwargs: Any) -> Tensor:
    """Return what ``torch.nn.functional.conv3d`` returns, with a faster second derivative."""
    return _convolution(3, *args, **kwargs)


def _convolution(
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: str | Numbers = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """Only a batch on a CPU in one precision; elsewhere, and inside function transforms, it is PyTorch's."""
    if isinstance(padding, str) or input.dim() != dimensions + 2 or not _plain(input, weight, bias):
        return NATIVE[dimensions](input, weight, bias, stride, padding, dilation, groups)
    numbers = (stride, padding, dilation)
    each = [list(value) if isinstance(value, Sequence) else [value] * dimensions for value in numbers]
    convolved: Tensor = _Convolution.apply(input, weight, bias, (*each, False, [0] * dimensions, groups))
    return convolved


def _plain(x: Tensor, *parameters: Tensor | None) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and all(value is None or value.dtype == x.dtype for value in parameters)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0  # no dual numbers: these functions have no ``jvp``
    )


class _Convolution(torch.autograd.Function):
    """y = w ∗ x + b, which is linear in w and in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return _convolve(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return *_ConvolutionGradients.apply(g, *ctx.saved_tensors, ctx.geometry, list(ctx.needs_input_grad[:3])), None


class _ConvolutionGradients(torch.autograd.Function):
    """For g = ∂y: ∂x = I(g, w) and ∂w = W(g, x), each linear in both, and ∂b = Σ g."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return _back(g, x, weight, geometry, wanted)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradient of ⟨v, ∂x⟩ + ⟨a, ∂w⟩ + ⟨b, ∂b⟩ = ⟨g, w ∗ v + a ∗ x + b⟩.

        To g that is w ∗ v + a ∗ x + b; to x and w it is what the backward pass gives with a and v in their places.
        """
        g, x, weight = ctx.saved_tensors
        differentiable = torch.is_grad_enabled()  # a third derivative is wanted
        convolve = _Convolution.apply if differentiable else _convolve
        back = _ConvolutionGradients.apply if differentiable else _back
        to_g = None
        if a is not None:
            to_g = convolve(x, a, b, ctx.geometry)
        elif b is not None:
            to_g = b.view(-1, *(1 for _ in x.shape[2:])).expand_as(g)
        if v is not None:
            through = convolve(v, weight, None, ctx.geometry)
            to_g = through if to_g is None else to_g + through
        wanted = [a is not None and ctx.needs_input_grad[1], v is not None and ctx.needs_input_grad[2], False]
        to_x = to_weight = None
        if any(wanted):
            to_x, to_weight, _ = back(g, x if v is None else v, weight if a is None else a, ctx.geometry, wanted)
        return to_g, to_x, to_weight, None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    y: Tensor = torch.ops.aten.convolution(x, weight, bias, *geometry)
    return y


def _back(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: list[bool]) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        g, x, weight, [weight.shape[0]], *geometry, wanted
    )
    return grads
