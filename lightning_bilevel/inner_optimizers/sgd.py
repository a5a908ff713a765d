"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lightning_bilevel.errors import combination_error
from lightning_bilevel.inner_optimizers.base import Hyperparameter, Projection
from lightning_bilevel.inner_optimizers.elementwise import ElementwiseOptimizer, Rule, State, Values
from lightning_bilevel.inner_optimizers.hyper import Value, add_scaled, is_number


class SGD(ElementwiseOptimizer):
    r"""Differentiable ``torch.optim.SGD``.

    With gradient g_t (plus ``weight_decay`` · θ), momentum μ and dampening τ::

        b_1 = g_1,    b_t = μ b_{t-1} + (1 - τ) g_t,    θ_t = θ_{t-1} - lr · d_t,

    where d_t is b_t, g_t + μ b_t with ``nesterov``, and g_t if μ is the number 0.

    OptState: ``"momentum"``; none for parameters whose momentum is the number 0.
    Cost: one tensor operation a parameter, one more each for weight decay, momentum, dampening and ``nesterov``.

    Args:
        lr: learning rate.
        momentum: μ.
        dampening: τ.
        weight_decay: factor of an ℓ2 penalty's gradient.
        nesterov: look ahead along the momentum.
        maximize: ascend.
        max_norm: clip ∇g to this norm, see :class:`InnerOptimizer`.
        projection: what becomes of θ after each step, see :class:`InnerOptimizer`.

    Raises:
        ValueError: a number is negative, infinite or nan; at the first use, also if a mapping
            has no pattern for a parameter or a tensor does not broadcast to a parameter's shape.
        MisconfigurationError: ``nesterov`` with zero momentum or with dampening.

    References:
        Sutskever et al., On the importance of initialization and momentum in deep learning (2013).

    >>> import torch
    >>> lr = torch.tensor(0.1, requires_grad=True)
    >>> optimizer, theta = SGD(lr), {"w": torch.tensor(1.0)}
    >>> theta, _ = optimizer.update(theta, {"w": torch.tensor(2.0)}, optimizer.init(theta), step=1)
    >>> torch.autograd.grad(theta["w"], lr)
    (tensor(-2.),)
    """

    stationary = True

    def __init__(
        self,
        lr: Hyperparameter = 1e-3,
        momentum: Hyperparameter = 0,
        dampening: Hyperparameter = 0,
        weight_decay: Hyperparameter = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        max_norm: float | Tensor | None = None,
        projection: Projection | None = None,
    ) -> None:
        values = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(maximize, values, max_norm, projection)
        self.nesterov = nesterov
        if nesterov and is_number(momentum, 0):
            raise combination_error(
                "`SGD(nesterov=True)` with zero momentum", "there is nothing to look ahead along", "Set `momentum=0.9`"
            )
        if nesterov and isinstance(dampening, (float, int)) and dampening != 0:
            raise combination_error(
                "`SGD(nesterov=True)` with dampening", "Nesterov momentum is defined without", "Set `dampening=0`"
            )

    def initial(self, values: Values) -> dict[str, Value]:
        """Return the opt_state of one parameter: the momentum if there is one."""
        return {} if is_number(values[1], 0) else {"momentum": 0.0}

    def rule(self, values: Values, step: int) -> Rule:
        """Return the rule of update number ``step``."""
        lr, momentum, dampening, weight_decay = values
        gain = 1 - dampening

        def move(param: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
            grad = add_scaled(grad, param, weight_decay)
            if is_number(momentum, 0):
                return add_scaled(param, grad, lr, value=-1), {}
            buffer, later = grad, cast(bool | Tensor, step > 1)
            if later is not False:
                damped = grad if is_number(gain, 1) else grad * gain
                buffer = add_scaled(damped, state["momentum"], momentum)
            if isinstance(later, Tensor):  # in a graph of all steps
                buffer = torch.where(later, buffer, grad)
            direction = add_scaled(grad, buffer, momentum) if self.nesterov else buffer
            return add_scaled(param, direction, lr, value=-1), {"momentum": buffer}

        return move
