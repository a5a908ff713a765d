"""A scalar whose gradient is known: a hypergradient for automatic optimization, or what a graph has computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Scaling by grad_output is what makes accumulation and loss scaling work.
        return (None, None, *(grad_output.to(grad.dtype) * grad for grad in ctx.grads))


def surrogate_loss(value: Tensor, grads: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Return ``value`` with a backward pass that gives ``parameters`` the gradients ``grads``.

    Unlike ``value + s - s.detach()`` with s = Σ ⟨g, φ⟩ this rounds nothing and cannot overflow.

    Args:
        value: h(φ), a 0-dim tensor.
        grads: the hypergradient, one tensor per parameter.
        parameters: the outer parameters themselves.

    >>> phi = torch.ones(2, requires_grad=True)
    >>> surrogate_loss(torch.tensor(0.5), [torch.tensor([1.0, 2.0])], [phi]).backward()
    >>> phi.grad
    tensor([1., 2.])
    """
    loss: Tensor = _Surrogate.apply(value, tuple(grads), *parameters)
    return loss
