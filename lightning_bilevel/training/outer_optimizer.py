"""Which optimizer steps the outer parameters of an existing module: one that is given, or one of the module's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_bilevel.errors import MisconfigurationError, combination_error, missing_error, value_error
from lightning_bilevel.host import LightningModule
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.modules.levels import abbreviate
from lightning_bilevel.training.selection import defines

OuterOptimizerLike = torch.optim.Optimizer | Callable[[Any], Any] | None

_FIX = "Pass `bilevel(outer_optimizer=functools.partial(torch.optim.Adam, lr=0.01))`, say, which gets all of them"


def checked_outer_optimizer(given: Any) -> OuterOptimizerLike:
    """Return what was given for an outer optimizer, if it can be one.

    Raises:
        ValueError: it is no function of parameters, and no optimizer.
    """
    made = given.func if isinstance(given, functools.partial) else given
    inner = isinstance(made, InnerOptimizer) or (isinstance(made, type) and issubclass(made, InnerOptimizer))
    if given is None or (not inner and (callable(given) or _alone(given))):
        return given
    raise value_error(
        "bilevel(outer_optimizer=...)",
        "a `torch.optim` class, a partial of one, or a function of the outer parameters",
        given,
        "Write `functools.partial(torch.optim.Adam, lr=0.01)`, say.",
    )


def chosen_outer_optimizer(module: LightningModule, given: OuterOptimizerLike, outer: Sequence[nn.Parameter]) -> Any:
    """Return the optimizer that has the outer parameters and its schedules, in a form that Lightning takes.

    Args:
        module: the module.
        given: what :func:`checked_outer_optimizer` returned: called with ``outer``, or with the module where its first
            argument is named so; an instance is taken as it is; ``None`` asks the module's ``configure_optimizers``.
        outer: the outer parameters. Of several optimizers the one that has any of them is returned, with its own
            schedules.

    Raises:
        ValueError: a form that Lightning does not know.
        MisconfigurationError: there is no optimizer, none has an outer parameter, or more than one has some.

    >>> class Pair(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.maker, self.judge = nn.Linear(1, 1), nn.Linear(1, 1)
    ...     def configure_optimizers(self):
    ...         return torch.optim.Adam(self.maker.parameters()), torch.optim.SGD(self.judge.parameters())
    >>> pair = Pair()
    >>> type(chosen_outer_optimizer(pair, None, list(pair.judge.parameters()))).__name__
    'SGD'
    >>> type(chosen_outer_optimizer(pair, torch.optim.RMSprop, list(pair.judge.parameters()))).__name__
    'RMSprop'
    """
    owner = type(module).__name__
    configured: Any
    if given is None:
        source = f"{owner}.configure_optimizers()"
        configured = module.configure_optimizers() if defines(module, "configure_optimizers") else None
    else:
        source = "outer_optimizer(params)"
        configured = given
        if callable(given):
            configured = given(module if _first_argument(given) == "module" else list(outer))
    if configured is None:
        raise missing_error(owner, f"optimizer of the outer parameters: `{source}` returns none", _FIX)
    alone = _alone(configured)
    if not alone:
        expected = "an optimizer, or another form that Lightning takes from `configure_optimizers`"
        raise value_error(source, expected, configured)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    phi = {id(parameter): names[id(parameter)] for parameter in outer}
    holding = [configuration for optimizer, configuration in alone if _held(optimizer) & phi.keys()]
    if len(holding) != 1:
        raise _not_one(source, len(alone), len(holding), abbreviate(list(phi.values())))
    return configured if len(alone) == 1 else holding[0]


def _alone(configured: Any) -> list[tuple[Any, Any]]:
    """Return each optimizer in what ``configure_optimizers`` returned, and what would configure it alone."""
    if _is_optimizer(configured):
        return [(configured, configured)]
    if isinstance(configured, Mapping):
        # How often each of several optimizers is stepped in turn means nothing for one.
        alone = {key: value for key, value in configured.items() if key != "frequency"}
        return [(alone["optimizer"], alone)] if _is_optimizer(alone.get("optimizer")) else []
    if not isinstance(configured, (list, tuple)):
        return []
    if len(configured) == 2 and isinstance(configured[0], list):
        optimizers, schedules = configured
        schedules = schedules if isinstance(schedules, (list, tuple)) else [schedules]
        if not all(map(_is_optimizer, optimizers)):
            return []
        return [(each, ([each], [s for s in schedules if _scheduled(s) is each])) for each in optimizers]
    return [pair for entry in configured for pair in _alone(entry)]


def _is_optimizer(thing: Any) -> bool:
    """Return whether this is an optimizer as Lightning sees it, which need not be of PyTorch's class."""
    return hasattr(thing, "param_groups") and hasattr(thing, "step") and not isinstance(thing, type)


def _scheduled(schedule: Any) -> Any:
    schedule = schedule.get("scheduler") if isinstance(schedule, Mapping) else schedule
    return getattr(schedule, "optimizer", None)


def _held(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _first_argument(function: Any) -> str:
    try:
        return next(iter(inspect.signature(function).parameters), "")
    except (TypeError, ValueError):  # a builtin has none to show
        return ""


def _not_one(source: str, optimizers: int, holding: int, names: str) -> MisconfigurationError:
    what = "the optimizer" if optimizers == 1 else f"the {optimizers} optimizers"
    if holding:
        because = f"{holding} of them have outer parameters, and Lightning steps one: {names}"
    else:
        because = f"{'it has' if optimizers == 1 else 'they have'} none of the outer parameters: {names}"
    return combination_error(f"`bilevel` with {what} that `{source}` returns", because, _FIX)
