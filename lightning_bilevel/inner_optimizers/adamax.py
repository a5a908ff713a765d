"""Adamax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_bilevel.inner_optimizers.base import Hyperparameter, Projection
from lightning_bilevel.inner_optimizers.elementwise import ElementwiseOptimizer, Rule, State, Values
from lightning_bilevel.inner_optimizers.hyper import Value, add_ratio, add_scaled, average, check_betas


class Adamax(ElementwiseOptimizer):
    r"""Differentiable ``torch.optim.Adamax``: Adam with a running maximum in place of the second moment.

    With gradient g_t (plus ``weight_decay`` · θ) and m_t of :class:`Adam`, all per entry::

        u_t = max(β2 u_{t-1}, |g_t| + eps),    θ_t = θ_{t-1} - lr / (1 - β1^t) · m_t / u_t.

    The derivative of the maximum is that of the larger one, and that of ``|g|`` is 0 at 0.

    OptState: ``"exp_avg"`` m and ``"exp_inf"`` u.
    Cost: six tensor operations a parameter, one more for weight decay.

    Args:
        lr: learning rate.
        betas: the pair (β1, β2); each in [0, 1).
        eps: added to the gradient's size.
        weight_decay: factor of an ℓ2 penalty's gradient.
        maximize: ascend.
        max_norm: clip ∇g to this norm, see :class:`InnerOptimizer`.
        projection: what becomes of θ after each step, see :class:`InnerOptimizer`.

    Raises:
        ValueError: a number is out of range; at the first use, also if a mapping has no pattern
            for a parameter or a tensor does not broadcast to a parameter's shape.

    References:
        Kingma and Ba, Adam: a method for stochastic optimization (2015), algorithm 2.

    >>> optimizer, theta = Adamax(lr=0.1), {"w": torch.tensor([1.0, 1.0])}
    >>> theta, opt_state = optimizer.update(theta, {"w": torch.tensor([3.0, 0.0])}, optimizer.init(theta), step=1)
    >>> theta
    {'w': tensor([0.9000, 1.0000])}
    """

    stationary = True

    def __init__(
        self,
        lr: Hyperparameter = 2e-3,
        betas: Sequence[Hyperparameter] = (0.9, 0.999),
        eps: Hyperparameter = 1e-8,
        weight_decay: Hyperparameter = 0,
        *,
        maximize: bool = False,
        max_norm: float | Tensor | None = None,
        projection: Projection | None = None,
    ) -> None:
        beta1, beta2 = check_betas(type(self).__name__, betas)
        values = {"lr": lr, "betas[0]": beta1, "betas[1]": beta2, "eps": eps, "weight_decay": weight_decay}
        super().__init__(maximize, values, max_norm, projection)

    def initial(self, values: Values) -> dict[str, Value]:
        """Return the opt_state of one parameter: the mean and the maximum."""
        return {"exp_avg": 0.0, "exp_inf": 0.0}

    def rule(self, values: Values, step: int) -> Rule:
        """Return the rule of update number ``step``."""
        lr, beta1, beta2, eps, weight_decay = values
        rate = lr / (1 - beta1**step)

        def move(param: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
            grad = add_scaled(grad, param, weight_decay)
            mean = average(state["exp_avg"], grad, 1 - beta1)
            largest = torch.maximum(state["exp_inf"] * beta2, grad.abs() + eps)
            return add_ratio(param, mean, largest, rate, value=-1), {"exp_avg": mean, "exp_inf": largest}

        return move
