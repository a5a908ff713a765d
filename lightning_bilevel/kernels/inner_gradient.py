"""The gradient that an inner optimizer sees, where it is not the derivative of the loss.

For some modules PyTorch's gradient is none: ``scale_grad_by_freq`` divides it, spectral norm takes the vectors of its
power iteration as constants. A run in plain PyTorch steps along it all the same, so that θ_T depends on φ by the true
derivative of *that* gradient. Kernels here keep both apart: :func:`as_seen` has PyTorch's rule while
:func:`inner_gradient` is active, and the true derivative everywhere else: in later passes through the graph of an inner
gradient, and in those of the outer loss.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

_taken = False  # of the process, not of a thread: on an accelerator other threads run the backward passes


class inner_gradient(AbstractContextManager[None]):  # noqa: N801  # a generator takes longer, at every inner step
    """Take the gradient of an inner loss for its optimizer, as PyTorch gives it.

    Only for the pass that takes it, not for the loss itself nor for later passes through its graph.
    """

    def __enter__(self) -> None:
        global _taken
        self._before, _taken = _taken, True

    def __exit__(self, *_: object) -> None:
        global _taken
        _taken = self._before


def as_seen(x: Tensor, factor: Tensor | float = 0.0) -> Tensor:
    """Return ``x``, of which an inner gradient sees ``factor`` times the derivative; zero makes a constant of it.

    Args:
        x: any tensor.
        factor: a number, or a tensor with as many dimensions as ``x`` that can be broadcast to it.
    """
    seen: Tensor = _AsSeen.apply(x, factor)
    return seen


def is_no_derivative(loss: Tensor) -> bool:
    """Return whether an inner gradient of this loss is not its derivative, so that its own need not be symmetric.

    Then ∂(∇g)/∂θ v is not the same as v ∂(∇g)/∂θ, which is all that one more backward pass gives.
    """
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            if isinstance(node, _AsSeen._backward_cls):
                return True
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return False


class _AsSeen(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: Tensor | float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        factor = inputs[1]
        tensors, ctx.number = ((factor,), None) if isinstance(factor, Tensor) else ((), factor)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (g,) = grads
        if not _taken:
            return g, None
        if ctx.number == 0:  # no gradient at all, as of a constant: zero times infinity would be nan
            return None, None
        return g * (ctx.saved_tensors[0] if ctx.number is None else ctx.number), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        tangent: Tensor = tangents[0]
        return tangent.view_as(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, factor: Tensor | float) -> tuple[Tensor, int]:
        # By hand: the rule that torch makes by itself fails where only one of the two has a tangent.
        of_x, of_factor = in_dims
        rows = x.expand(info.batch_size, *x.shape) if of_x is None else x.movedim(of_x, 0)
        if isinstance(factor, Tensor) and of_factor is not None:
            factor = factor.movedim(of_factor, 0)
        return as_seen(rows, factor), 0
