"""The base of inner optimizers whose rule looks at one parameter at a time."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_bilevel.errors import number, value_error
from lightning_bilevel.inner_optimizers.base import Hyperparameter, InnerOptimizer, OptState, PerStep, Projection
from lightning_bilevel.inner_optimizers.hyper import Value, check, is_number, resolve, safe_sqrt
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
        max_norm: clips the gradient, see :class:`InnerOptimizer`.
        projection: follows each step, see :class:`InnerOptimizer`.

    Attributes:
        per_step: whether a hyperparameter has values for each step.

    Raises:
        ValueError: a Python number among the hyperparameters is negative, infinite or nan, ``max_norm`` is not
            positive, or ``projection`` no function.
    """

    def __init__(
        self,
        maximize: bool,
        hyperparameters: dict[str, Hyperparameter],
        max_norm: float | Tensor | None = None,
        projection: Projection | None = None,
    ) -> None:
        owner = type(self).__name__
        if max_norm is not None and not isinstance(max_norm, Tensor):
            number(f"{owner}(max_norm=...)", max_norm, above=0)
        if projection is not None and not callable(projection):
            raise value_error(f"{owner}(projection=...)", "a function of the inner parameters by name", projection)
        self.max_norm, self.projection = max_norm, projection
        if max_norm is not None or projection is not None:
            self.elementwise = False  # a norm mixes entries, and a projection may
        for argument, value in hyperparameters.items():
            check(type(self).__name__, argument, value)
        self.maximize = maximize
        self.hyperparameters = hyperparameters
        self._only_numbers = all(isinstance(value, (float, int)) for value in hyperparameters.values())
        self.per_step = not self._only_numbers and any(map(_varies, hyperparameters.values()))

    elementwise = True

    @property
    def moves_fixed_points(self) -> bool:
        """Whether something moves them that no gradient of a function says: a projection, or a decay per step."""
        return self.projection is not None or _varies(self.hyperparameters.get(DECAY, 0))

    @abstractmethod
    def initial(self, values: Values) -> dict[str, Value]:
        """Return what each slot of a parameter is filled with, keyed by slot name."""

    @abstractmethod
    def rule(self, values: Values, step: int) -> Rule:
        """Return the rule of update number ``step`` for parameters with these hyperparameters."""

    def init(self, params: Params) -> OptState:
        """Return the state before the first step, shaped as ``params``; a slot no parameter needs does not exist."""
        if self.per_step:
            return self._at(1).init(params)
        opt_state: OptState = {}
        for (name, param), fills in zip(params.items(), self._per_parameter(self.initial, params), strict=True):
            for slot, fill in fills.items():
                opt_state.setdefault(slot, {})[name] = torch.zeros_like(param) + fill
        return opt_state

    def update(self, params: Params, grads: Params, opt_state: OptState, step: int) -> tuple[Params, OptState]:
        """Return the new parameters and the new state; see :meth:`InnerOptimizer.update`."""
        if self.per_step:
            return self._at(step).update(params, grads, opt_state, step)
        if self.max_norm is not None:
            grads = clipped(grads, self.max_norm)
        rules = self._per_parameter(lambda values: self.rule(values, step), params)
        new_params: Params = {}
        new_slots: OptState = {slot: {} for slot in opt_state}
        for (name, param), rule in zip(params.items(), rules, strict=True):
            grad = -grads[name] if self.maximize else grads[name]
            state = {slot: tensors[name] for slot, tensors in opt_state.items() if name in tensors}
            new_params[name], state = rule(param, grad, state)
            for slot, tensor in state.items():
                new_slots[slot][name] = tensor
        return self._projected(new_params), new_slots

    def penalty(self, params: Params) -> Tensor | float:
        """Return ½ Σ ``weight_decay`` θ², whose gradient is the decay; zero unless fixed points are ``stationary``.

        >>> from lightning_bilevel import SGD
        >>> SGD(0.1, weight_decay={"*.bias": 0, "*": 3.0}).penalty({"0.weight": torch.ones(2), "0.bias": torch.ones(2)})
        tensor(3.)
        """
        decay = self.hyperparameters.get(DECAY, 0)
        if not self.stationary or self.moves_fixed_points or is_number(decay, 0):
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
        values = [
            value
            for argument, hyperparameter in self.hyperparameters.items()
            if argument not in (DECAY, "eps")
            for each in (hyperparameter.values() if isinstance(hyperparameter, Mapping) else (hyperparameter,))
            for value in (each.values if isinstance(each, PerStep) else (each,))
        ]
        return [value for value in (*values, self.max_norm) if isinstance(value, Tensor)]

    def _at(self, step: int) -> Self:
        """Return this optimizer with the values of one step."""
        chosen = copy.copy(self)
        chosen.hyperparameters = {argument: _chosen(value, step) for argument, value in self.hyperparameters.items()}
        chosen.per_step = False
        chosen._only_numbers = all(isinstance(value, (float, int)) for value in chosen.hyperparameters.values())
        return chosen

    def _projected(self, params: Params) -> Params:
        if self.projection is None:
            return params
        kept = self.projection(dict(params))
        if not isinstance(kept, Mapping) or any(
            name not in kept or kept[name].shape != value.shape for name, value in params.items()
        ):
            shapes = {name: tuple(value.shape) for name, value in params.items()}
            found = {name: tuple(value.shape) for name, value in kept.items()} if isinstance(kept, Mapping) else kept
            what = f"what the projection of `{type(self).__name__}` returns"
            raise value_error(what, f"a mapping with the shapes {shapes}", found)
        return {name: kept[name] for name in params}

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


def clipped(grads: Params, max_norm: float | Tensor) -> Params:
    """Return gradients of a norm of at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` makes them.

    >>> clipped({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1.0)
    {'w': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    squares = [(g.conj() * g).real.sum() for g in grads.values()]
    norm = safe_sqrt(torch.stack([square.to(squares[0]) for square in squares]).sum())
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return {name: g * factor.to(g.real) for name, g in grads.items()}


def _varies(value: Hyperparameter) -> bool:
    if isinstance(value, (float, int, Tensor)):
        return False
    values = value.values() if isinstance(value, Mapping) else (value,)
    return any(isinstance(each, PerStep) for each in values)


def _chosen(value: Hyperparameter, step: int) -> Hyperparameter:
    if isinstance(value, Mapping):
        return {name: _at(each, step) if isinstance(each, PerStep) else each for name, each in value.items()}
    return _at(value, step) if isinstance(value, PerStep) else value


def _at(value: PerStep, step: int) -> float | Tensor:
    """Return the value of a step; a number 0 among others as a tensor, for that of all steps leaves state out."""
    chosen = value.at(step)
    everywhere = not isinstance(value.values, Tensor) and all(is_number(each, 0) for each in value.values)
    return torch.tensor(0.0) if is_number(chosen, 0) and not everywhere else chosen


def _detached(value: Hyperparameter) -> Hyperparameter:
    if isinstance(value, Mapping):
        return {pattern: v.detach() if isinstance(v, Tensor) else v for pattern, v in value.items()}
    return value.detach() if isinstance(value, Tensor) else value
