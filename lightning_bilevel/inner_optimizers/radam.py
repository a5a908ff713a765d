"""RAdam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_bilevel.inner_optimizers.base import Hyperparameter, Projection
from lightning_bilevel.inner_optimizers.elementwise import ElementwiseOptimizer, Rule, State, Values
from lightning_bilevel.inner_optimizers.hyper import (
    Value,
    add_ratio,
    add_scaled,
    average,
    check_betas,
    decoupled,
    root_plus,
    without_decay,
)


class RAdam(ElementwiseOptimizer):
    r"""Differentiable ``torch.optim.RAdam``: Adam whose rate is rectified while v_t rests on few gradients.

    With m̂_t and v_t of :class:`Adam`, ρ_∞ = 2 / (1 - β2) - 1 and ρ_t = ρ_∞ - 2 t β2^t / (1 - β2^t)::

        θ_t = θ_{t-1} - lr · m̂_t r_t √(1 - β2^t) / (√v_t + eps)    where ρ_t > 5, else    θ_t = θ_{t-1} - lr · m̂_t,
        r_t = √((ρ_t - 4)(ρ_t - 2) ρ_∞ / ((ρ_∞ - 4)(ρ_∞ - 2) ρ_t)).

    Where v_t is exactly 0 the derivative of √v_t is taken to be 0, as in :class:`Adam`. That ρ_t passes 5 at another
    step for another β2 has no derivative.

    OptState: ``"exp_avg"`` m and ``"exp_avg_sq"`` v.
    Cost: six tensor operations a parameter, one more for weight decay; both rules where β2 is a tensor.

    Args:
        lr: learning rate.
        betas: the pair (β1, β2); each in [0, 1).
        eps: added to the root.
        weight_decay: factor of an ℓ2 penalty's gradient; with ``decoupled_weight_decay``, of the shrinking of θ.
        decoupled_weight_decay: shrink θ by 1 - ``lr * weight_decay``, as AdamW does, and leave the gradient alone.
        maximize: ascend.
        max_norm: clip ∇g to this norm, see :class:`InnerOptimizer`.
        projection: what becomes of θ after each step, see :class:`InnerOptimizer`.

    Raises:
        ValueError: a number is out of range; at the first use, also if a mapping has no pattern
            for a parameter or a tensor does not broadcast to a parameter's shape.

    References:
        Liu et al., On the variance of the adaptive learning rate and beyond (2020), algorithm 2.

    >>> optimizer, theta = RAdam(lr=0.1), {"w": torch.tensor([1.0, 1.0])}
    >>> theta, opt_state = optimizer.update(theta, {"w": torch.tensor([3.0, 0.0])}, optimizer.init(theta), step=1)
    >>> theta
    {'w': tensor([0.7000, 1.0000])}
    """

    def __init__(
        self,
        lr: Hyperparameter = 1e-3,
        betas: Sequence[Hyperparameter] = (0.9, 0.999),
        eps: Hyperparameter = 1e-8,
        weight_decay: Hyperparameter = 0,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        max_norm: float | Tensor | None = None,
        projection: Projection | None = None,
    ) -> None:
        beta1, beta2 = check_betas(type(self).__name__, betas)
        values = {"lr": lr, "betas[0]": beta1, "betas[1]": beta2, "eps": eps, "weight_decay": weight_decay}
        super().__init__(maximize, values, max_norm, projection)
        self.decoupled_weight_decay = decoupled_weight_decay
        self.stationary = not decoupled_weight_decay or without_decay(weight_decay)

    def initial(self, values: Values) -> dict[str, Value]:
        """Return the opt_state of one parameter: two moments."""
        return {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def rule(self, values: Values, step: int) -> Rule:
        """Return the rule of update number ``step``."""
        lr, beta1, beta2, eps, weight_decay = values
        coupled, shrink = decoupled(lr, weight_decay, self.decoupled_weight_decay)
        plain, (rectified, rectification) = lr / (1 - beta1**step), _rectified(beta2, step)
        rate = plain * rectification * (1 - beta2**step) ** 0.5

        def move(param: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
            grad = add_scaled(grad, param, coupled)
            mean = average(state["exp_avg"], grad, 1 - beta1)
            square = average(state["exp_avg_sq"], grad * grad, 1 - beta2)
            moments = {"exp_avg": mean, "exp_avg_sq": square}
            param = param * shrink
            if rectified is False:
                return add_scaled(param, mean, plain, value=-1), moments
            new = add_ratio(param, mean, root_plus(square, eps), rate, value=-1)
            if isinstance(rectified, Tensor):
                new = torch.where(rectified, new, add_scaled(param, mean, plain, value=-1))
            return new, moments

        return move


def _rectified(beta2: Value, step: int) -> tuple[bool | Tensor, Value]:
    """Return whether ρ_t > 5, and r_t, which is some number where it is not."""
    infinite = 2 / (1 - beta2) - 1
    length = infinite - 2 * step * beta2**step / (1 - beta2**step)
    if not isinstance(length, Tensor) or not isinstance(infinite, Tensor):
        return (True, _rectification(length, infinite)) if length > 5 else (False, 1.0)
    large = length > 5
    return large, _rectification(torch.where(large, length, 6.0), torch.where(large, infinite, 6.0))


def _rectification(length: Value, infinite: Value) -> Value:
    return ((length - 4) * (length - 2) * infinite / ((infinite - 4) * (infinite - 2) * length)) ** 0.5
