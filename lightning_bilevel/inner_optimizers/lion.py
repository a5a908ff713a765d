"""Lion."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_bilevel.inner_optimizers.base import Hyperparameter, Projection
from lightning_bilevel.inner_optimizers.elementwise import ElementwiseOptimizer, Rule, State, Values
from lightning_bilevel.inner_optimizers.hyper import Value, add_scaled, average, check_betas, without_decay


class Lion(ElementwiseOptimizer):
    r"""Lion, the signs of an interpolated momentum, with decoupled weight decay.

    With gradient g_t and betas (β1, β2), all per entry::

        θ_t = (1 - lr · weight_decay) θ_{t-1} - lr · sign(β1 m_{t-1} + (1 - β1) g_t),
        m_t = β2 m_{t-1} + (1 - β2) g_t.

    A sign has the derivative 0. So a hypergradient sees ``lr`` and ``weight_decay``, but nothing of what acts through
    the gradients: example weights, penalties, a learned loss or initialization but for its shift. ``ZerothOrder`` sees
    the jumps on average. For those use :class:`AdamW`.

    OptState: ``"exp_avg"`` m. Cost: three tensor operations a parameter, one more for weight decay.

    Args:
        lr: learning rate; about a tenth of AdamW's.
        betas: the pair (β1, β2); each in [0, 1).
        weight_decay: the decay; a step shrinks θ by 1 - ``lr * weight_decay``.
        maximize: ascend.
        max_norm: clip ∇g to this norm, see :class:`InnerOptimizer`.
        projection: what becomes of θ after each step, see :class:`InnerOptimizer`.

    Raises:
        ValueError: a number is out of range; at the first use, also if a mapping has no pattern
            for a parameter or a tensor does not broadcast to a parameter's shape.

    References:
        Chen et al., Symbolic discovery of optimization algorithms (2023), algorithm 2, arXiv 2302.06675.

    >>> import torch
    >>> optimizer, theta = Lion(lr=0.1, weight_decay=0.5), {"w": torch.tensor([1.0, 1.0])}
    >>> theta, opt_state = optimizer.update(theta, {"w": torch.tensor([3.0, 0.0])}, optimizer.init(theta), step=1)
    >>> theta
    {'w': tensor([0.8500, 0.9500])}
    """

    def __init__(
        self,
        lr: Hyperparameter = 1e-4,
        betas: Sequence[Hyperparameter] = (0.9, 0.99),
        weight_decay: Hyperparameter = 0,
        *,
        maximize: bool = False,
        max_norm: float | Tensor | None = None,
        projection: Projection | None = None,
    ) -> None:
        beta1, beta2 = check_betas(type(self).__name__, betas)
        values = {"lr": lr, "betas[0]": beta1, "betas[1]": beta2, "weight_decay": weight_decay}
        super().__init__(maximize, values, max_norm, projection)
        self.stationary = without_decay(weight_decay)

    def initial(self, values: Values) -> dict[str, Value]:
        """Return the opt_state of one parameter: the momentum."""
        return {"exp_avg": 0.0}

    def rule(self, values: Values, step: int) -> Rule:
        """Return the rule of every update."""
        lr, beta1, beta2, weight_decay = values
        shrink = 1 - lr * weight_decay

        def move(param: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
            signs = average(state["exp_avg"], grad, 1 - beta1).sgn()
            new = add_scaled(param * shrink, signs, lr, value=-1)
            return new, {"exp_avg": average(state["exp_avg"], grad, 1 - beta2)}

        return move
