"""NAdam."""

from __future__ import annotations

from collections.abc import Sequence

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


class NAdam(ElementwiseOptimizer):
    r"""Differentiable ``torch.optim.NAdam``: Adam with Nesterov's look ahead.

    With gradient g_t (plus ``weight_decay`` · θ), moments m_t and v_t of :class:`Adam`, and ψ = ``momentum_decay``::

        μ_t = β1 (1 - ½ 0.96^{t ψ}),    M_t = μ_1 ⋯ μ_t,    √v̂_t = √(v_t / (1 - β2^t)),
        θ_t = θ_{t-1} - lr · [(1 - μ_t) / (1 - M_t) · g_t + μ_{t+1} / (1 - M_t μ_{t+1}) · m_t] / (√v̂_t + eps).

    Where v_t is exactly 0 the derivative of √v_t is taken to be 0, as in :class:`Adam`.

    OptState: ``"exp_avg"`` m, ``"exp_avg_sq"`` v and ``"mu_product"`` M, an entry for every one of θ.
    Cost: nine tensor operations a parameter, one more for weight decay.

    Args:
        lr: learning rate.
        betas: the pair (β1, β2); each in [0, 1).
        eps: added to the root.
        weight_decay: factor of an ℓ2 penalty's gradient; with ``decoupled_weight_decay``, of the shrinking of θ.
        momentum_decay: ψ.
        decoupled_weight_decay: shrink θ by 1 - ``lr * weight_decay``, as AdamW does, and leave the gradient alone.
        maximize: ascend.
        max_norm: clip ∇g to this norm, see :class:`InnerOptimizer`.
        projection: what becomes of θ after each step, see :class:`InnerOptimizer`.

    Raises:
        ValueError: a number is out of range; at the first use, also if a mapping has no pattern
            for a parameter or a tensor does not broadcast to a parameter's shape.

    References:
        Dozat, Incorporating Nesterov momentum into Adam (2016).

    >>> import torch
    >>> optimizer, theta = NAdam(lr=0.1, betas=(0.0, 0.5)), {"w": torch.tensor([1.0, 1.0])}
    >>> theta, opt_state = optimizer.update(theta, {"w": torch.tensor([3.0, 0.0])}, optimizer.init(theta), step=1)
    >>> theta
    {'w': tensor([0.9000, 1.0000])}
    """

    def __init__(
        self,
        lr: Hyperparameter = 2e-3,
        betas: Sequence[Hyperparameter] = (0.9, 0.999),
        eps: Hyperparameter = 1e-8,
        weight_decay: Hyperparameter = 0,
        momentum_decay: Hyperparameter = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        max_norm: float | Tensor | None = None,
        projection: Projection | None = None,
    ) -> None:
        beta1, beta2 = check_betas(type(self).__name__, betas)
        values = {"lr": lr, "betas[0]": beta1, "betas[1]": beta2, "eps": eps, "weight_decay": weight_decay}
        super().__init__(maximize, {**values, "momentum_decay": momentum_decay}, max_norm, projection)
        self.decoupled_weight_decay = decoupled_weight_decay
        self.stationary = not decoupled_weight_decay or without_decay(weight_decay)

    def initial(self, values: Values) -> dict[str, Value]:
        """Return the opt_state of one parameter: two moments, and the product of the momenta."""
        return {"exp_avg": 0.0, "exp_avg_sq": 0.0, "mu_product": 1.0}

    def rule(self, values: Values, step: int) -> Rule:
        """Return the rule of update number ``step``."""
        lr, beta1, beta2, eps, weight_decay, decay = values
        coupled, shrink = decoupled(lr, weight_decay, self.decoupled_weight_decay)
        mu, following = (beta1 * (1 - 0.5 * 0.96 ** (t * decay)) for t in (step, step + 1))
        root = (1 - beta2**step) ** 0.5  # θ's denominator, multiplied through by it

        def move(param: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
            grad = add_scaled(grad, param, coupled)
            mean = average(state["exp_avg"], grad, 1 - beta1)
            square = average(state["exp_avg_sq"], grad * grad, 1 - beta2)
            product = state["mu_product"] * mu
            ahead = grad * ((1 - mu) / (1 - product)) + mean * (following / (1 - product * following))
            new = add_ratio(param * shrink, ahead, root_plus(square, root * eps), lr * root, value=-1)
            return new, {"exp_avg": mean, "exp_avg_sq": square, "mu_product": product}

        return move
