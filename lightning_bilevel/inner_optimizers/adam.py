"""Adam, and what it shares with AdamW."""

from __future__ import annotations

from abc import abstractmethod
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
    is_number,
    root_plus,
)


class AdamFamily(ElementwiseOptimizer):
    """The moments of Adam; a subclass says how weights decay. Arguments: see :class:`Adam`."""

    def __init__(
        self,
        lr: Hyperparameter,
        betas: Sequence[Hyperparameter],
        eps: Hyperparameter,
        weight_decay: Hyperparameter,
        amsgrad: bool,
        maximize: bool,
        max_norm: float | Tensor | None,
        projection: Projection | None,
    ) -> None:
        owner = type(self).__name__
        beta1, beta2 = check_betas(owner, betas)
        values = {"lr": lr, "betas[0]": beta1, "betas[1]": beta2, "eps": eps, "weight_decay": weight_decay}
        super().__init__(maximize, values, max_norm, projection)
        self.amsgrad = amsgrad

    @abstractmethod
    def decays(self, lr: Value, weight_decay: Value) -> tuple[Value, Value]:
        """Return the multiple of θ that is added to the gradient, and the factor by which θ shrinks."""

    def initial(self, values: Values) -> dict[str, Value]:
        """Return the opt_state of one parameter: two or three moments."""
        opt_state: dict[str, Value] = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
        return opt_state | {"max_exp_avg_sq": 0.0} if self.amsgrad else opt_state

    def rule(self, values: Values, step: int) -> Rule:
        """Return the rule of update number ``step``."""
        lr, beta1, beta2, eps, weight_decay = values
        coupled, shrink = self.decays(lr, weight_decay)
        weight1, weight2 = 1 - beta1, 1 - beta2
        # m̂ / (√v̂ + eps) with m̂ = m / (1 - β1^t) and √v̂ = √v / root, multiplied through by root
        root = (1 - beta2**step) ** 0.5
        floor, rate = root * eps, lr * (root / (1 - beta1**step))

        def move(param: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
            grad = add_scaled(grad, param, coupled)
            mean = average(state["exp_avg"], grad, weight1)
            square = average(state["exp_avg_sq"], grad * grad, weight2)
            moments = {"exp_avg": mean, "exp_avg_sq": square}
            if self.amsgrad:
                square = moments["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], square)
            if not is_number(shrink, 1):
                param = param * shrink
            return add_ratio(param, mean, root_plus(square, floor), rate, value=-1), moments

        return move


class Adam(AdamFamily):
    r"""Differentiable ``torch.optim.Adam``.

    With gradient g_t (plus ``weight_decay`` · θ) and betas (β1, β2), all per entry::

        m_t = β1 m_{t-1} + (1 - β1) g_t,    v_t = β2 v_{t-1} + (1 - β2) g_t²,
        θ_t = θ_{t-1} - lr · m̂_t / (√v̂_t + eps),    m̂_t = m_t / (1 - β1^t),    v̂_t = v_t / (1 - β2^t),

    with max_{s ≤ t} v_s for v_t under ``amsgrad``. Where v_t is exactly 0 the derivative of √v_t
    is taken to be 0; that of θ_t by g_t is then large (it has the factor 1 / ``eps``), but finite.

    OptState: ``"exp_avg"`` m, ``"exp_avg_sq"`` v and, with ``amsgrad``, ``"max_exp_avg_sq"``.
    Cost: seven tensor operations a parameter, one more each for weight decay and ``amsgrad``.
    Reverse mode holds g, m and √v + eps of each step; two more tensors where β2 or ``eps`` is one.
    Prefer a larger ``eps``, or :class:`SGD`, when vanishing gradients blow hypergradients up by 1 / ``eps``.

    Args:
        lr: learning rate.
        betas: the pair (β1, β2); each in [0, 1).
        eps: added to the root.
        weight_decay: factor of an ℓ2 penalty's gradient.
        amsgrad: never let the second moment shrink.
        maximize: ascend.
        max_norm: clip ∇g to this norm, see :class:`InnerOptimizer`.
        projection: what becomes of θ after each step, see :class:`InnerOptimizer`.

    Raises:
        ValueError: a number is out of range; at the first use, also if a mapping has no pattern
            for a parameter or a tensor does not broadcast to a parameter's shape.

    References:
        Kingma and Ba, Adam: a method for stochastic optimization (2015), algorithm 1;
        Reddi et al., On the convergence of Adam and beyond (2018), for ``amsgrad``.

    >>> optimizer, theta = Adam(lr=0.1), {"w": torch.tensor([1.0, 1.0])}
    >>> theta, opt_state = optimizer.update(theta, {"w": torch.tensor([3.0, 0.0])}, optimizer.init(theta), step=1)
    >>> theta
    {'w': tensor([0.9000, 1.0000])}
    """

    stationary = True

    def __init__(
        self,
        lr: Hyperparameter = 1e-3,
        betas: Sequence[Hyperparameter] = (0.9, 0.999),
        eps: Hyperparameter = 1e-8,
        weight_decay: Hyperparameter = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        max_norm: float | Tensor | None = None,
        projection: Projection | None = None,
    ) -> None:
        super().__init__(lr, betas, eps, weight_decay, amsgrad, maximize, max_norm, projection)

    def decays(self, lr: Value, weight_decay: Value) -> tuple[Value, Value]:
        """Return a decay that is part of the gradient."""
        return weight_decay, 1.0
