"""Adagrad."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bilevel.inner_optimizers.base import Hyperparameter, Projection
from lightning_bilevel.inner_optimizers.elementwise import ElementwiseOptimizer, Rule, State, Values
from lightning_bilevel.inner_optimizers.hyper import Value, add_ratio, add_scaled, root_plus


class Adagrad(ElementwiseOptimizer):
    r"""Differentiable ``torch.optim.Adagrad``.

    With gradient g_t (plus ``weight_decay`` · θ), all per entry::

        s_t = s_{t-1} + g_t²,    θ_t = θ_{t-1} - lr / (1 + (t - 1) · lr_decay) · g_t / (√s_t + eps).

    Where s_t is exactly 0 the derivative of √s_t is taken to be 0; that of θ_t by g_t is then large
    (it has the factor 1 / ``eps``), but finite. A positive ``initial_accumulator_value`` avoids it.

    OptState: ``"sum"`` s, from ``initial_accumulator_value``.
    Cost: five tensor operations a parameter, one more for weight decay.

    Args:
        lr: learning rate.
        lr_decay: how fast the learning rate decays.
        weight_decay: factor of an ℓ2 penalty's gradient.
        initial_accumulator_value: s_0.
        eps: added to the root.
        maximize: ascend.
        max_norm: clip ∇g to this norm, see :class:`InnerOptimizer`.
        projection: what becomes of θ after each step, see :class:`InnerOptimizer`.

    Raises:
        ValueError: a number is negative, infinite or nan; at the first use, also if a mapping
            has no pattern for a parameter or a tensor does not broadcast to a parameter's shape.

    References:
        Duchi et al., Adaptive subgradient methods for online learning and stochastic optimization (2011).

    >>> optimizer, theta = Adagrad(lr=0.1), {"w": torch.tensor([1.0, 1.0])}
    >>> theta, opt_state = optimizer.update(theta, {"w": torch.tensor([3.0, 0.0])}, optimizer.init(theta), step=1)
    >>> theta
    {'w': tensor([0.9000, 1.0000])}
    """

    stationary = True

    def __init__(
        self,
        lr: Hyperparameter = 1e-2,
        lr_decay: Hyperparameter = 0,
        weight_decay: Hyperparameter = 0,
        initial_accumulator_value: Hyperparameter = 0,
        eps: Hyperparameter = 1e-10,
        *,
        maximize: bool = False,
        max_norm: float | Tensor | None = None,
        projection: Projection | None = None,
    ) -> None:
        values = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(maximize, values, max_norm, projection)

    def initial(self, values: Values) -> dict[str, Value]:
        """Return the slot of one parameter: the sum of squares."""
        return {"sum": values[3]}

    def rule(self, values: Values, step: int) -> Rule:
        """Return the rule of update number ``step``."""
        lr, lr_decay, weight_decay, _, eps = values
        rate = lr * (1 / (1 + (step - 1) * lr_decay))

        def move(param: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
            grad = add_scaled(grad, param, weight_decay)
            total = torch.addcmul(state["sum"], grad, grad)
            return add_ratio(param, grad, root_plus(total, eps), rate, value=-1), {"sum": total}

        return move
