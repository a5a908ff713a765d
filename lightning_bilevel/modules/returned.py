"""What a user's hooks return, checked: a loss, an optimizer, weights of steps, parameters by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bilevel.errors import combination_error, no_loss_error, value_error
from lightning_bilevel.modules.hooks import BilevelHooks
from lightning_bilevel.tree import Params


def scalar(module: nn.Module, hook: str, loss: Any) -> Tensor:
    """Return a loss, or the ``"loss"`` of a mapping, as Lightning takes both; raise unless it is one number."""
    what = f"{type(module).__name__}.{hook}(batch)"
    if loss is None:
        raise no_loss_error(what)
    if isinstance(loss, Mapping) and "loss" in loss:
        loss = loss["loss"]
    if not isinstance(loss, Tensor) or loss.ndim:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise value_error(what, "a 0-dim tensor", got, "Reduce it with `.mean()` or `.sum()`.")
    if not loss.is_floating_point():
        hint = "A count has no gradient: take a smooth loss, or `.float()` of it with `ZerothOrder`."
        raise value_error(what, "a tensor of floating-point numbers", f"a tensor of {loss.dtype}", hint)
    return loss


def step_weights(module: BilevelHooks, weights: Any, like: Tensor) -> Tensor:
    """Return what ``outer_loss_weights()`` returned as one tensor, after a check that it is a number a step."""
    if isinstance(weights, (list, tuple)):
        each = [torch.as_tensor(weight, dtype=like.real.dtype, device=like.device) for weight in weights]
        weights = torch.stack(each) if each else None
    if not isinstance(weights, Tensor) or weights.shape != (module.inner_steps,) or weights.is_complex():
        got = f"a tensor of shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else weights
        expected = f"`inner_steps` = {module.inner_steps} real numbers, one for each of θ_1 … θ_T, or None"
        raise value_error(f"{type(module).__name__}.outer_loss_weights()", expected, got)
    return weights


def named(module: nn.Module, hook: str, expected: Params, got: Mapping[str, Any]) -> Params:
    """Check that a hook returned the inner parameters, by name and shape, and put them in order."""
    if not isinstance(got, Mapping) or set(got) != set(expected):
        names = sorted(got) if isinstance(got, Mapping) else type(got).__name__
        raise value_error(f"{type(module).__name__}.{hook}", f"a mapping with the keys {sorted(expected)}", names)
    for name, value in got.items():
        what, present = f"{type(module).__name__}.{hook}[{name!r}]", expected[name]
        if not isinstance(value, Tensor):
            hint = "Write `torch.as_tensor(...)` with the parameter's dtype and device."
            raise value_error(what, "a tensor", type(value).__name__, hint)
        if value.shape != present.shape:
            raise value_error(what, f"of shape {tuple(present.shape)}", tuple(value.shape))
        if value.dtype != present.dtype:
            hint = "Convert it: `.to(parameter)`."
            raise value_error(what, f"of {present.dtype}", value.dtype, hint)
    return {name: got[name] for name in expected}


def refuse_learned(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a hyperparameter with a gradient: the instance is taken once, and would not follow φ."""
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name != "params" and any(isinstance(v, Tensor) and v.requires_grad for v in (value, *_entries(value))):
                kind = type(optimizer).__name__
                raise combination_error(
                    f"`torch.optim.{kind}` with a learned `{name}` as the inner optimizer",
                    "the instance is built once, so that its rate would not follow the outer parameters",
                    f"Return `lightning_bilevel.{kind}({name}=...)`, which is built at every inner step",
                )


def refuse_scheduled(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a learning-rate scheduler, which leaves its mark in the groups: nothing would step it."""
    if any("initial_lr" in group for group in optimizer.param_groups):
        kind = type(optimizer).__name__
        raise combination_error(
            f"a scheduler of `torch.optim.lr_scheduler` on the inner optimizer `{kind}`",
            "the instance is taken once, and its rate would stay the first",
            f"Return `lightning_bilevel.{kind}(lr=...)` with the rate of now, computed from `self.global_step`",
        )


def _entries(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else ()
