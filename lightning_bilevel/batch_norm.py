"""Batch norm with a short double backward.

In a MAML step of a small CNN, PyTorch's own takes a quarter of the time. Its third derivatives are wrong, besides: they
take the statistics of the batch as constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NATIVE = torch.batch_norm
NATIVE_INSTANCE_NORM = torch.instance_norm


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Return what ``torch.batch_norm`` returns, with a faster second derivative and a right third one.

    Only on a CPU, in training mode and in one precision; elsewhere, and inside function transforms, it is PyTorch's.
    """
    if not training or not _plain(input, weight, bias):
        return NATIVE(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
    scale = input.new_ones(input.shape[1]) if weight is None else weight
    normalized: Tensor = _BatchNorm.apply(input, scale, bias, running_mean, running_var, momentum, eps)
    return normalized


def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Return what ``torch.instance_norm`` returns: batch norm with every image's channels as channels of their own."""
    if not use_input_stats or running_mean is not None or not _plain(input, weight, bias):
        return NATIVE_INSTANCE_NORM(
            input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled
        )
    count = len(input)
    scale, shift = (None if value is None else value.repeat(count) for value in (weight, bias))
    images = input.reshape(1, -1, *input.shape[2:])
    return batch_norm(images, scale, shift, None, None, True, momentum, eps, cudnn_enabled).view_as(input)


def _plain(x: Tensor, *parameters: Tensor | None) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and all(value is None or value.dtype == x.dtype for value in parameters)
        and not torch._C._are_functorch_transforms_active()
    )


class _BatchNorm(torch.autograd.Function):
    """y = w x̂ + b with x̂ = (x - μ) r, and μ and r = (variance + eps)^-1/2 over all but the channels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, r = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, r)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_x, to_weight, to_bias = _Backward.apply(*grads, *ctx.saved_tensors, ctx.eps)
        return to_x, to_weight, to_bias if ctx.needs_input_grad[2] else None, None, None, None, None


class _Backward(torch.autograd.Function):
    """With E the mean over a channel: ∂x = w r (g - E g - x̂ E(g x̂)), ∂w = Σ g x̂, ∂b = Σ g, for g = ∂y."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(g, x, weight, mean, r)
        ctx.eps = eps
        masks = [True, True, True]
        grads: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, r, True, eps, masks
        )
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of ⟨v, ∂x⟩ + ⟨a, ∂w⟩ + ⟨b, ∂b⟩.

        With s = E(v g) - E v E g - E(v x̂) E(g x̂) and M entries a channel, ⟨v, ∂x⟩ = w r M s. By x̂ alone it changes
        with u = (a - w r E(v x̂)) g - w r E(g x̂) v, which x moves as in the backward pass; by r with w M s.
        """
        (v, a, b), (g, x, weight, mean, r) = grads, ctx.saved_tensors
        channels = [0, *range(2, x.dim())]
        if torch.is_grad_enabled():  # a third derivative is wanted, and these depend on x
            mean, r = x.mean(channels), (x.var(channels, unbiased=False) + ctx.eps).rsqrt()
        shape = (1, -1, *(1 for _ in channels[1:]))

        def wide(values: Tensor) -> Tensor:
            return values.view(shape)

        normal = torch.addcmul(wide(-mean * r), x, wide(r))
        v_mean, g_mean = v.mean(channels), g.mean(channels)
        v_x, g_x = (v * normal).mean(channels), (g * normal).mean(channels)
        s = (v * g).mean(channels) - v_mean * g_mean - v_x * g_x
        scale = weight * r
        on_g, on_v = a - scale * v_x, -scale * g_x
        u_mean, u_x = on_v * v_mean + on_g * g_mean, on_v * v_x + on_g * g_x

        to_x = v * wide(r * on_v)
        to_x.addcmul_(g, wide(r * on_g)).addcmul_(normal, wide(-r * (u_x + scale * s))).sub_(wide(r * u_mean))
        to_g = v * wide(scale)
        to_g.addcmul_(normal, wide(on_g)).add_(wide(b - scale * v_mean))
        return to_g, to_x, r * s * (x.numel() // x.shape[1]), None, None, None
