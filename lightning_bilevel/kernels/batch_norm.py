"""Batch norm with a short double backward.

PyTorch's third derivatives ignore the statistics of the batch, and its double backward is long: what it costs is in
``benchmarks/results/where_time_goes.json``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

NATIVE = torch.batch_norm
NATIVE_INSTANCE_NORM = torch.instance_norm
NATIVE_BACKWARD = torch.ops.aten.native_batch_norm_backward


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
    channels = input.shape[1:2].numel()
    fits = all(each is None or each.numel() == channels for each in (weight, bias, running_mean, running_var))
    if not training or not fits or not _plain(input, weight, bias):  # PyTorch's says what does not fit
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
    if not use_input_stats or not _plain(input, weight, bias):
        return NATIVE_INSTANCE_NORM(
            input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled
        )
    count = len(input)
    scale, shift, mean, var = (
        None if value is None else value.repeat(count) for value in (weight, bias, running_mean, running_var)
    )
    images = input.reshape(1, -1, *input.shape[2:])
    normalized = batch_norm(images, scale, shift, mean, var, True, momentum, eps, cudnn_enabled).view_as(input)
    with torch.no_grad():
        for running, of_images in ((running_mean, mean), (running_var, var)):
            if running is not None and of_images is not None:
                running.copy_(of_images.view(count, -1).mean(0))
    return normalized


def _plain(x: Tensor, *parameters: Tensor | None) -> bool:
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and x.dtype in (torch.float32, torch.float64)
        and all(value is None or value.dtype == x.dtype for value in parameters)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0  # no dual numbers: these functions have no ``jvp``
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
        to_x, g_x, g_sum = NATIVE_BACKWARD(g, x, weight, None, None, mean, r, True, eps, [True, True, True])
        ctx.save_for_backward(g, x, weight, mean, r, g_x, g_sum)
        ctx.eps = eps
        return to_x, g_x, g_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of ⟨v, ∂x⟩ + ⟨a, ∂w⟩ + ⟨b, ∂b⟩.

        With M entries a channel and S = Σ v g - (Σ v Σ g + Σ v x̂ Σ g x̂) / M, ⟨v, ∂x⟩ = w r S. By x̂ alone it changes
        with u = (a - w r E(v x̂)) g - w r E(g x̂) v, which x moves as in the backward pass; by r with w S. All three
        gradients are sums of v, g and x with a factor for each channel.
        """
        (v, a, b), (g, x, weight, mean, r, g_x, g_sum) = grads, ctx.saved_tensors
        channels, count = [0, *range(2, x.dim())], x.numel() // x.shape[1]
        if torch.is_grad_enabled():  # a third derivative is wanted, and these depend on x
            mean, r = x.mean(channels), (x.var(channels, unbiased=False) + ctx.eps).rsqrt()
            _, v_x, v_sum = _Backward.apply(v, x, weight, mean, r, ctx.eps)
        else:
            _, v_x, v_sum = NATIVE_BACKWARD(v, x, None, None, None, mean, r, True, ctx.eps, [False, True, True])
        scale, r_mean = weight * r, r / count
        each = weight * r_mean
        on_g, on_v = torch.addcmul(a, each, v_x, value=-1), each * -g_x
        s = torch.sub((v * g).sum(channels), torch.addcmul(v_sum * g_sum, v_x, g_x), alpha=1 / count)
        u_sum, u_x = torch.addcmul(on_v * v_sum, on_g, g_sum), torch.addcmul(on_v * v_x, on_g, g_x)
        on_g, on_v = r * on_g, r * on_v
        on_x = -r * r_mean * torch.addcmul(u_x, scale, s)
        shape = (1, -1, *(1 for _ in channels[1:]))

        def wide(values: Tensor) -> Tensor:
            return values.view(shape)

        to_x = v * wide(on_v)
        to_x.addcmul_(g, wide(on_g)).addcmul_(x, wide(on_x)).sub_(wide(torch.addcmul(r_mean * u_sum, mean, on_x)))
        to_g = v * wide(scale)
        to_g.addcmul_(x, wide(on_g)).add_(wide(b - torch.addcmul(each * v_sum, mean, on_g)))
        return to_g, to_x, r * s, None, None, None
