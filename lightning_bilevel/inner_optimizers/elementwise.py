"""The base of inner optimizers whose rule looks at one parameter at a time."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_bilevel.inner_optimizers.base import Hyperparameter, InnerOptimizer, OptState
from lightning_bilevel.inner_optimizers.hyper import Value, check, is_number, resolve
from lightning_bilevel.tree import Params

Values = tuple[Value, ...]
"""The hyperparameters at one parameter, in the order in which the constructor declared them."""

State = dict[str, Tensor]
"""The opt_state of one parameter, keyed by slot name."""

Rule = Callable[[Tensor, Tensor, State], tuple[Tensor, State]]
"""Maps a parameter, its gradient and its state to the new parameter and the new state."""

T = TypeVar("T")

DECAY = "weight_decay"
"""The hyperparameter that moves fixed points; the others, rates and averages, say how they are reached."""


class ElementwiseOptimizer(InnerOptimizer):
    """Resolves hyperparameters, loops over parameters; a subclass says what happens to one of them.

    Parameters that share all hyperparameters share one rule, so arithmetic among hyperparameters
    (such as a bias correction) is done once an update and not once a parameter.

    Args:
        maximize: whether gradients change their sign.
        hyperparameters: what :meth:`initial` and :meth:`rule` receive, keyed by argument name.

    Raises:
        ValueError: a Python number among the hyperparameters is negative, infinite or nan.
    """

    def __init__(self, maximize: bool, hyperparameters: dict[str, Hyperparameter]) -> None:
        for argument, value in hyperparameters.items():
            check(type(self).__name__, argument, value)
        self.maximize = maximize
        self.hyperparameters = hyperparameters
        self._only_numbers = all(isinstance(value, (float, int)) for value in hyperparameters.values())

    elementwise = True

    @abstractmethod
    def initial(self, values: Values) -> dict[str, Value]:
        """Return what each slot of a parameter is filled with, keyed by slot name."""

    @abstractmethod
    def rule(self, values: Values, step: int) -> Rule:
        """Return the rule of update number ``step`` for parameters with these hyperparameters."""

    def init(self, params: Params) -> OptState:
        """Return the state before the first step, shaped as ``params``; a slot no parameter needs does not exist."""
        opt_state: OptState = {}
        for (name, param), fills in zip(params.items(), self._per_parameter(self.initial, params), strict=True):
            for slot, fill in fills.items():
                opt_state.setdefault(slot, {})[name] = torch.zeros_like(param) + fill
        return opt_state

    def update(self, params: Params, grads: Params, opt_state: OptState, step: int) -> tuple[Params, OptState]:
        """Return the new parameters and the new state; see :meth:`InnerOptimizer.update`."""
        rules = self._per_parameter(lambda values: self.rule(values, step), params)
        new_params: Params = {}
        new_slots: OptState = {slot: {} for slot in opt_state}
        for (name, param), rule in zip(params.items(), rules, strict=True):
            grad = -grads[name] if self.maximize else grads[name]
            state = {slot: tensors[name] for slot, tensors in opt_state.items() if name in tensors}
            new_params[name], state = rule(param, grad, state)
            for slot, tensor in state.items():
                new_slots[slot][name] = tensor
        return new_params, new_slots

    def penalty(self, params: Params) -> Tensor | float:
        """Return ½ Σ ``weight_decay`` θ², whose gradient is the decay; zero unless fixed points are ``stationary``.

        >>> from lightning_bilevel import SGD
        >>> SGD(0.1, weight_decay={"*.bias": 0, "*": 3.0}).penalty({"0.weight": torch.ones(2), "0.bias": torch.ones(2)})
        tensor(3.)
        """
        decay = self.hyperparameters.get(DECAY, 0)
        if not self.stationary or is_number(decay, 0):
            return 0.0
        values = resolve(type(self).__name__, DECAY, decay, params)
        squares = {name: (p.conj() * p).real for name, p in params.items()}
        terms = [(square * value).sum() for square, value in zip(squares.values(), values, strict=True)]
        return torch.stack(terms).sum() / 2

    def with_constant_decay(self) -> Self:
        """Return this optimizer with a weight decay that depends on nothing, where its meaning is known."""
        if self.stationary is None or DECAY not in self.hyperparameters:
            return self
        fixed = copy.copy(self)
        fixed.hyperparameters = {**self.hyperparameters, DECAY: _detached(self.hyperparameters[DECAY])}
        return fixed

    def rates(self) -> list[Tensor]:
        """Return the tensors among the hyperparameters that no fixed point depends on: all but decay and ``eps``."""
        return [
            value
            for argument, hyperparameter in self.hyperparameters.items()
            if argument not in (DECAY, "eps")
            for value in (hyperparameter.values() if isinstance(hyperparameter, Mapping) else (hyperparameter,))
            if isinstance(value, Tensor)
        ]

    def _per_parameter(self, make: Callable[[Values], T], params: Params) -> list[T]:
        """Return ``make(values)`` of each parameter, made once for all parameters of the same values."""
        if self._only_numbers:
            return [make(tuple(self.hyperparameters.values()))] * len(params)  # type: ignore[arg-type]
        owner = type(self).__name__
        columns = [resolve(owner, argument, value, params) for argument, value in self.hyperparameters.items()]
        made: dict[tuple[int, ...], T] = {}
        results = []
        for values in zip(*columns, strict=True):
            key = tuple(map(id, values))
            if key not in made:
                made[key] = make(values)
            results.append(made[key])
        return results


def _detached(value: Hyperparameter) -> Hyperparameter:
    if isinstance(value, Mapping):
        return {pattern: v.detach() if isinstance(v, Tensor) else v for pattern, v in value.items()}
    return value.detach() if isinstance(value, Tensor) else value
