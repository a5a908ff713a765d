"""Adadelta."""

from __future__ import annotations

from torch import Tensor

from lightning_bilevel.inner_optimizers.base import Hyperparameter, Projection
from lightning_bilevel.inner_optimizers.elementwise import ElementwiseOptimizer, Rule, State, Values
from lightning_bilevel.inner_optimizers.hyper import Value, add_scaled, average, check, safe_sqrt


class Adadelta(ElementwiseOptimizer):
    r"""Differentiable ``torch.optim.Adadelta``.

    With gradient g_t (plus ``weight_decay`` · θ), all per entry::

        v_t = ρ v_{t-1} + (1 - ρ) g_t²,    δ_t = √(a_{t-1} + eps) / √(v_t + eps) · g_t,
        a_t = ρ a_{t-1} + (1 - ρ) δ_t²,    θ_t = θ_{t-1} - lr · δ_t.

    With ``eps=0`` the derivative of a root at exactly 0 is taken to be 0.

    OptState: ``"square_avg"`` v and ``"acc_delta"`` a.
    Cost: ten tensor operations a parameter, one more for weight decay.

    Args:
        lr: learning rate.
        rho: ρ, in [0, 1].
        eps: added under the roots.
        weight_decay: factor of an ℓ2 penalty's gradient.
        maximize: ascend.
        max_norm: clip ∇g to this norm, see :class:`InnerOptimizer`.
        projection: what becomes of θ after each step, see :class:`InnerOptimizer`.

    Raises:
        ValueError: a number is out of range; at the first use, also if a mapping has no pattern
            for a parameter or a tensor does not broadcast to a parameter's shape.

    References:
        Zeiler, Adadelta: an adaptive learning rate method (2012), algorithm 1.

    >>> import torch
    >>> optimizer, theta = Adadelta(rho=0.0, eps=1.0), {"w": torch.tensor([1.0, 1.0], dtype=torch.float64)}
    >>> grads = {"w": torch.tensor([0.75, 0.0], dtype=torch.float64)}
    >>> theta, opt_state = optimizer.update(theta, grads, optimizer.init(theta), step=1)
    >>> theta  # 0.75 / √(1 + 0.75²) = 0.6
    {'w': tensor([0.4000, 1.0000], dtype=torch.float64)}
    """

    stationary = True

    def __init__(
        self,
        lr: Hyperparameter = 1.0,
        rho: Hyperparameter = 0.9,
        eps: Hyperparameter = 1e-6,
        weight_decay: Hyperparameter = 0,
        *,
        maximize: bool = False,
        max_norm: float | Tensor | None = None,
        projection: Projection | None = None,
    ) -> None:
        check(type(self).__name__, "rho", rho, below=1)
        super().__init__(
            maximize, {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay}, max_norm, projection
        )

    def initial(self, values: Values) -> dict[str, Value]:
        """Return the opt_state of one parameter: the squares of gradients and of steps."""
        return {"square_avg": 0.0, "acc_delta": 0.0}

    def rule(self, values: Values, step: int) -> Rule:
        """Return the rule of every update."""
        lr, rho, eps, weight_decay = values
        weight = 1 - rho

        def move(param: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
            grad = add_scaled(grad, param, weight_decay)
            square = average(state["square_avg"], grad * grad, weight)
            delta = safe_sqrt(state["acc_delta"] + eps) / safe_sqrt(square + eps) * grad
            moved = average(state["acc_delta"], delta * delta, weight)
            return add_scaled(param, delta, lr, value=-1), {"square_avg": square, "acc_delta": moved}

        return move
