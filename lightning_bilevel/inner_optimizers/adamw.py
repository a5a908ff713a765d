"""Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_bilevel.inner_optimizers.adam import AdamFamily
from lightning_bilevel.inner_optimizers.base import Hyperparameter, Projection
from lightning_bilevel.inner_optimizers.hyper import Value, without_decay


class AdamW(AdamFamily):
    r"""Differentiable ``torch.optim.AdamW``: :class:`Adam` whose weight decay is not part of the gradient.

    With m̂_t and v̂_t of :class:`Adam`, from gradients without decay::

        θ_t = (1 - lr · weight_decay) θ_{t-1} - lr · m̂_t / (√v̂_t + eps).

    Derivatives at zero gradients, opt_state and cost are those of :class:`Adam`. With a decay it stays where
    m / (√v + eps) = −``weight_decay`` · θ, and there no simple function is stationary.

    Args:
        lr: learning rate.
        betas: the pair (β1, β2); each in [0, 1).
        eps: added to the root.
        weight_decay: the decay; a step shrinks θ by 1 - ``lr * weight_decay``.
        amsgrad: never let the second moment shrink.
        maximize: ascend.
        max_norm: clip ∇g to this norm, see :class:`InnerOptimizer`.
        projection: what becomes of θ after each step, see :class:`InnerOptimizer`.

    Raises:
        ValueError: a number is out of range; at the first use, also if a mapping has no pattern
            for a parameter or a tensor does not broadcast to a parameter's shape.

    References:
        Loshchilov and Hutter, Decoupled weight decay regularization (2019), algorithm 2.

    >>> import torch
    >>> optimizer, theta = AdamW(lr=0.1, weight_decay=0.5), {"w": torch.tensor([1.0, 1.0])}
    >>> theta, opt_state = optimizer.update(theta, {"w": torch.tensor([3.0, 0.0])}, optimizer.init(theta), step=1)
    >>> theta
    {'w': tensor([0.8500, 0.9500])}
    """

    def __init__(
        self,
        lr: Hyperparameter = 1e-3,
        betas: Sequence[Hyperparameter] = (0.9, 0.999),
        eps: Hyperparameter = 1e-8,
        weight_decay: Hyperparameter = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        max_norm: float | Tensor | None = None,
        projection: Projection | None = None,
    ) -> None:
        super().__init__(lr, betas, eps, weight_decay, amsgrad, maximize, max_norm, projection)
        self.stationary = without_decay(weight_decay)

    def decays(self, lr: Value, weight_decay: Value) -> tuple[Value, Value]:
        """Return a decay that shrinks the parameter."""
        return 0.0, 1 - lr * weight_decay
