"""Conversion of ``torch.optim`` instances."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_bilevel.errors import combination_error, value_error
from lightning_bilevel.inner_optimizers.adadelta import Adadelta
from lightning_bilevel.inner_optimizers.adagrad import Adagrad
from lightning_bilevel.inner_optimizers.adam import Adam
from lightning_bilevel.inner_optimizers.adamax import Adamax
from lightning_bilevel.inner_optimizers.adamw import AdamW
from lightning_bilevel.inner_optimizers.base import InnerOptimizer
from lightning_bilevel.inner_optimizers.nadam import NAdam
from lightning_bilevel.inner_optimizers.radam import RAdam
from lightning_bilevel.inner_optimizers.rmsprop import RMSprop
from lightning_bilevel.inner_optimizers.sgd import SGD

# By exact type, because a subclass may do anything. Hyperparameters may differ between groups, flags may not.
_MOMENTS = ("lr", "betas", "eps", "weight_decay")
_ADAM = (_MOMENTS, ("amsgrad", "maximize", "decoupled_weight_decay"))
_CONVERSIONS: dict[type, tuple[type[InnerOptimizer], tuple[str, ...], tuple[str, ...]]] = {
    torch.optim.SGD: (SGD, ("lr", "momentum", "dampening", "weight_decay"), ("nesterov", "maximize")),
    torch.optim.Adam: (Adam, *_ADAM),
    torch.optim.AdamW: (AdamW, *_ADAM),
    torch.optim.RMSprop: (RMSprop, ("lr", "alpha", "eps", "weight_decay", "momentum"), ("centered", "maximize")),
    torch.optim.Adagrad: (Adagrad, ("lr", "lr_decay", "weight_decay", "eps"), ("maximize",)),
    torch.optim.NAdam: (NAdam, (*_MOMENTS, "momentum_decay"), ("decoupled_weight_decay", "maximize")),
    torch.optim.RAdam: (RAdam, _MOMENTS, ("decoupled_weight_decay", "maximize")),
    torch.optim.Adamax: (Adamax, _MOMENTS, ("maximize",)),
    torch.optim.Adadelta: (Adadelta, ("lr", "rho", "eps", "weight_decay"), ("maximize",)),
}


def from_torch(optimizer: torch.optim.Optimizer, named_parameters: Mapping[str, Tensor]) -> InnerOptimizer:
    """Convert a ``torch.optim`` instance into the inner optimizer of the same values.

    Groups become mappings from parameter names. Options that do not change values (``foreach``, ``fused``,
    ``capturable``, ``differentiable``) are ignored, and so are parameters that are not in ``named_parameters``.
    State is not taken over: the inner optimizer starts as a new one.

    Args:
        optimizer: a ``torch.optim.SGD``, ``Adam``, ``AdamW``, ``NAdam``, ``RAdam``, ``Adamax``, ``RMSprop``,
            ``Adagrad`` or ``Adadelta``, not a subclass.
        named_parameters: the inner parameters, the very tensors that ``optimizer`` got, keyed by name.

    Raises:
        ValueError: another class of optimizer.
        MisconfigurationError: an inner parameter is in no group, or groups differ in a flag such as ``nesterov``.

    >>> net = torch.nn.Linear(2, 1)
    >>> groups = [{"params": [net.weight]}, {"params": [net.bias], "lr": 1.0}]
    >>> from_torch(torch.optim.SGD(groups, lr=0.1), dict(net.named_parameters())).hyperparameters["lr"]
    {'weight': 0.1, 'bias': 1.0}
    """
    if type(optimizer) not in _CONVERSIONS:
        supported = ", ".join(f"`{kind.__name__}`" for kind in _CONVERSIONS)
        raise value_error(
            "from_torch(optimizer)",
            f"one of torch.optim's {supported}, not a subclass",
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
            "Write any other rule as an `InnerOptimizer`.",
        )
    target, hyperparameters, flags = _CONVERSIONS[type(optimizer)]
    groups = _groups(optimizer, named_parameters)
    options = {flag: _same_in_all(flag, groups) for flag in flags}
    options |= {argument: _merge(argument, groups) for argument in hyperparameters}
    if target in (Adam, AdamW) and options.pop("decoupled_weight_decay"):  # torch.optim.Adam takes this flag too
        target = AdamW
    if target is Adagrad:  # torch.optim reads this one from the constructor, whatever the groups say
        options["initial_accumulator_value"] = optimizer.defaults["initial_accumulator_value"]
    return target(**options)


def _groups(optimizer: torch.optim.Optimizer, named_parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return the group of each inner parameter, keyed by name."""
    by_parameter = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    missing = [name for name, param in named_parameters.items() if id(param) not in by_parameter]
    if missing:
        raise combination_error(
            f"this `{type(optimizer).__name__}` as the inner optimizer",
            f"it does not hold the inner parameters {missing}",
            "Construct it with all inner parameters",
        )
    return {name: by_parameter[id(param)] for name, param in named_parameters.items()}


def _same_in_all(flag: str, groups: dict[str, dict[str, Any]]) -> bool:
    """Return a flag that has one value in all groups."""
    values = {group.get(flag, False) for group in groups.values()}
    if len(values) > 1:
        raise combination_error(
            f"parameter groups that differ in `{flag}`",
            "it is one flag for all inner parameters",
            f"Use the same `{flag}` in every group",
        )
    return bool(values.pop())


def _merge(argument: str, groups: dict[str, dict[str, Any]]) -> Any:
    """Return a hyperparameter: one value if all groups have it, otherwise a mapping from names."""
    values = {glob.escape(name): group[argument] for name, group in groups.items()}
    if argument == "betas":
        return tuple(_collapse({name: pair[i] for name, pair in values.items()}) for i in range(2))
    return _collapse(values)


def _collapse(values: dict[str, Any]) -> Any:
    first, *rest = values.values()
    same = all(value is first or (not isinstance(value, Tensor) and value == first) for value in rest)
    return first if same else values
