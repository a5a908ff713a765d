"""RMSprop."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bilevel.inner_optimizers.base import Hyperparameter, Projection
from lightning_bilevel.inner_optimizers.elementwise import ElementwiseOptimizer, Rule, State, Values
from lightning_bilevel.inner_optimizers.hyper import Value, add_ratio, add_scaled, average, is_number, root_plus


class RMSprop(ElementwiseOptimizer):
    r"""Differentiable ``torch.optim.RMSprop``.

    With gradient g_t (plus ``weight_decay`` · θ), smoothing α and momentum μ, all per entry::

        v_t = α v_{t-1} + (1 - α) g_t²,    b_t = μ b_{t-1} + g_t / (√v_t + eps),    θ_t = θ_{t-1} - lr · b_t,

    with the variance v_t - a_t², a_t = α a_{t-1} + (1 - α) g_t, for v_t under the root if ``centered``.
    Where v_t is exactly 0 the derivative of √v_t is taken to be 0; that of θ_t by g_t is then large
    (it has the factor 1 / ``eps``), but finite. Where rounding makes the variance negative it is
    taken to be 0; ``torch.optim`` returns nan.

    OptState: ``"square_avg"`` v; with ``centered`` ``"grad_avg"`` a; ``"momentum"`` b unless μ is the number 0.
    Cost: six tensor operations a parameter, one more for weight decay,
    two more each for momentum and ``centered``.

    Args:
        lr: learning rate.
        alpha: α.
        eps: added to the root.
        weight_decay: factor of an ℓ2 penalty's gradient.
        momentum: μ.
        centered: divide by the standard deviation.
        maximize: ascend.
        max_norm: clip ∇g to this norm, see :class:`InnerOptimizer`.
        projection: what becomes of θ after each step, see :class:`InnerOptimizer`.

    Raises:
        ValueError: a number is negative, infinite or nan; at the first use, also if a mapping
            has no pattern for a parameter or a tensor does not broadcast to a parameter's shape.

    References:
        Tieleman and Hinton, Lecture 6.5 of Neural networks for machine learning (2012);
        Graves, Generating sequences with recurrent neural networks (2013), eq. 38–41, for ``centered``.

    >>> optimizer, theta = RMSprop(lr=0.1, alpha=0.75), {"w": torch.tensor([1.0, 1.0])}
    >>> theta, opt_state = optimizer.update(theta, {"w": torch.tensor([3.0, 0.0])}, optimizer.init(theta), step=1)
    >>> theta
    {'w': tensor([0.8000, 1.0000])}
    """

    stationary = True

    def __init__(
        self,
        lr: Hyperparameter = 1e-2,
        alpha: Hyperparameter = 0.99,
        eps: Hyperparameter = 1e-8,
        weight_decay: Hyperparameter = 0,
        momentum: Hyperparameter = 0,
        centered: bool = False,
        *,
        maximize: bool = False,
        max_norm: float | Tensor | None = None,
        projection: Projection | None = None,
    ) -> None:
        values = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(maximize, values, max_norm, projection)
        self.centered = centered

    def initial(self, values: Values) -> dict[str, Value]:
        """Return the opt_state of one parameter: the squares, the mean if centered, the momentum if there is one."""
        opt_state: dict[str, Value] = {"square_avg": 0.0}
        if self.centered:
            opt_state["grad_avg"] = 0.0
        if not is_number(values[4], 0):
            opt_state["momentum"] = 0.0
        return opt_state

    def rule(self, values: Values, step: int) -> Rule:
        """Return the rule of every update."""
        lr, alpha, eps, weight_decay, momentum = values
        weight = 1 - alpha

        def move(param: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
            grad = add_scaled(grad, param, weight_decay)
            square = average(state["square_avg"], grad * grad, weight)
            new_state = {"square_avg": square}
            if self.centered:
                mean = new_state["grad_avg"] = average(state["grad_avg"], grad, weight)
                square = torch.addcmul(square, mean, mean, value=-1)
            denominator = root_plus(square, eps)
            if is_number(momentum, 0):
                return add_ratio(param, grad, denominator, lr, value=-1), new_state
            buffer = new_state["momentum"] = torch.addcdiv(state["momentum"] * momentum, grad, denominator)
            return add_scaled(param, buffer, lr, value=-1), new_state

        return move
