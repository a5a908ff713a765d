"""The interface of a differentiable inner optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lightning_bilevel.errors import value_error
from lightning_bilevel.tree import Params

OptState = dict[str, Params]
"""Optimizer state: slot name (such as ``"momentum"``) to tensors keyed by parameter name."""


class PerStep:
    """A hyperparameter with one value for each inner step, as MAML++ learns its rates.

    The step's number is taken modulo T, so that where the inner level goes on from outer step to outer step each run
    of T steps has the same values.

    Args:
        values: T numbers or tensors, or a tensor whose first dimension is T.

    >>> import torch
    >>> rates = PerStep(torch.tensor([0.1, 0.2]))
    >>> rates.at(1), rates.at(2), rates.at(3)
    (tensor(0.1000), tensor(0.2000), tensor(0.1000))
    """

    def __init__(self, values: Sequence[float | Tensor] | Tensor) -> None:
        if len(values) == 0:
            raise value_error("PerStep(values)", "at least one value", values)
        self.values = values

    def at(self, step: int) -> float | Tensor:
        """Return the value of the update with this number, from 1."""
        return self.values[(step - 1) % len(self.values)]


Hyperparameter = float | Tensor | PerStep | Mapping[str, float | Tensor | PerStep]
"""A number, a tensor, one of these per step, or a mapping from parameter-name patterns (``fnmatch``) to any of them."""

Projection = Callable[[Params], Mapping[str, Tensor]]
"""θ after a step to the θ that is kept, by name: a projection onto a set, or any proximal map."""


class InnerOptimizer(ABC):
    """A pure update rule: no tensor is changed in place, so any order of derivative passes through.

    Instances are cheap: one is built per inner step, with the current outer parameters in place,
    so that a hyperparameter may be a tensor that depends on them.

    What the implicit gradient differentiates is said by ``stationary``, ``maximize`` and :meth:`penalty`; everything
    else takes :meth:`update` as it is.

    This package's own take two more arguments:

    - ``max_norm`` clips the gradient to a norm, over all parameters, as ``torch.nn.utils.clip_grad_norm_`` does: by the
      factor ``max_norm`` / (‖∇g‖ + 1e-6) where that is below 1. The factor is differentiated, and each of several
      stacked episodes has its own.
    - ``projection`` is called with θ after each step, by name, and returns the θ that is kept: a projection onto a set,
      or the proximal map of a penalty that has no gradient. It is differentiated too, and may use outer parameters.
      ``ImplicitGradient`` sees it with ``form="fixed_point"`` only.

    Attributes:
        elementwise: whether entry i of the new parameters depends on entry i of parameters, gradients and state only.
            A class that says so gets stacked episodes as one, and a part of the parameters at a time, which is faster;
            it is compared once with a loop. Rules that mix entries (a global norm, say) leave it at ``False``, and so
            does a class that overrides a method without a word.
        stationary: whether its fixed points, where an update changes nothing any more, are the θ at which
            g + :meth:`penalty` has gradient zero (−g + :meth:`penalty` where it ascends). ``None``: nobody said, which
            the implicit gradient takes for yes and checks as it goes. A projection, or a decay that is no part of the
            gradient, makes it ``False``. A subclass that changes what its fixed points are says so.
        maximize: whether it ascends.

    >>> import torch
    >>> class Signs(InnerOptimizer):
    ...     def update(self, params, grads, opt_state, step):
    ...         return {name: value - 0.1 * grads[name].sign() for name, value in params.items()}, {}
    >>> Signs().update({"w": torch.ones(1)}, {"w": torch.full((1,), 3.0)}, {}, step=1)
    ({'w': tensor([0.9000])}, {})
    """

    elementwise: bool = False
    stationary: bool | None = None
    maximize: bool = False

    def init(self, params: Params) -> OptState:
        """Return the state before the first step; none by default."""
        return {}

    @abstractmethod
    def update(self, params: Params, grads: Params, opt_state: OptState, step: int) -> tuple[Params, OptState]:
        """Return the new parameters and the new state.

        Args:
            params: current inner parameters, possibly with a leading dimension of stacked episodes.
            grads: inner gradients, shaped as ``params``.
            opt_state: state from :meth:`init` or the previous update.
            step: number of this update, from 1.
        """

    def penalty(self, params: Params) -> Tensor | float:
        """Return what updates decrease besides the loss, a scalar function of θ; zero by default.

        A hyperparameter that depends on the outer parameters, a learned weight decay, is differentiated through it.

        Args:
            params: the inner parameters of one episode.
        """
        return 0.0


_PACKAGE = __name__.partition(".")[0]


def is_ours(optimizer: InnerOptimizer) -> bool:
    """Return whether the optimizer's class is this package's own."""
    return type(optimizer).__module__.partition(".")[0] == _PACKAGE


def is_elementwise(optimizer: InnerOptimizer) -> bool:
    """Return whether the class that defines the update says that it is elementwise, or the object does.

    >>> class Clipped(InnerOptimizer):
    ...     def update(self, params, grads, opt_state, step): ...
    >>> is_elementwise(Clipped())
    False
    """
    if "elementwise" in vars(optimizer):
        return bool(optimizer.elementwise)
    for kind in type(optimizer).__mro__:
        if "elementwise" in vars(kind):
            return bool(kind.elementwise)  # type: ignore[attr-defined]
        rules = [name for name in ("init", "update", "initial", "rule") if name in vars(kind)]
        if rules and kind.__module__.partition(".")[0] != _PACKAGE:
            return False
    return False
