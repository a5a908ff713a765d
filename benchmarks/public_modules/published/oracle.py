"""The derivative of h along a direction by central differences of a loop in plain PyTorch, which shares no code with the
library: levels are found by name, inner steps are gradient descent, the training step is called as Lightning would."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[Any, Any], Tensor]


def named(module: Any, patterns: str | Sequence[str]) -> dict[str, Tensor]:
    """Return the parameters of a level by name; one that has several names by the first that matches."""
    chosen = [patterns] if isinstance(patterns, str) else patterns
    found = {
        id(parameter): (name, parameter)
        for name, parameter in reversed([*module.named_parameters(remove_duplicate=False)])
        if any(name == each or name.startswith(f"{each}.") or fnmatchcase(name, each) for each in chosen)
        and parameter.requires_grad
    }
    return dict(reversed(found.values()))


def training_step(module: Any, batch: Any) -> Tensor:
    """Return the loss of a training step."""
    result = module.training_step(batch, 0)
    return result["loss"] if isinstance(result, dict) else result


def slope(
    module: Any,
    batches: Sequence[Any],
    inner: Any,
    outer: Any,
    direction: dict[str, Tensor],
    *,
    lr: float,
    steps: int,
    step_size: float,
    inner_loss: Loss = training_step,
    outer_loss: Loss = training_step,
) -> float:
    """Return (h(φ + εv) - h(φ - εv)) / 2ε.

    Args:
        module: at φ and the start of θ, with a Trainer; it is left there.
        batches: the inner one and the outer one.
        inner: patterns of θ's names.
        outer: patterns of φ's names.
        direction: v, by name.
        lr: of an inner step.
        steps: T.
        step_size: ε.
        inner_loss: of a module and a batch.
        outer_loss: likewise.
    """

    def value(shift: float) -> float:
        copied = copy.deepcopy(module)  # what a module keeps in plain attributes, such as a hidden state, starts anew
        copied.trainer, copied.log, copied.log_dict = module.trainer, _silent, _silent
        with torch.no_grad():
            for name, parameter in named(copied, outer).items():
                parameter += shift * direction[name]
        theta = list(named(copied, inner).values())
        for _ in range(steps):
            gradients = torch.autograd.grad(inner_loss(copied, batches[0]), theta, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(theta, gradients, strict=True):
                    if gradient is not None:
                        parameter -= lr * gradient
        return outer_loss(copied, batches[1]).item()

    return (value(step_size) - value(-step_size)) / (2 * step_size)


def _silent(*_: Any, **__: Any) -> None:
    """Log nothing."""


@contextmanager
def deterministic_and_precise() -> Iterator[None]:
    """Let reparameterized samples be the same numbers in every call, by their shape, and nothing round float64 to float32."""
    family = torch.distributions.normal
    before, as_float, to = family._standard_normal, Tensor.float, Tensor.to

    def kept(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        return to(tensor, *(torch.get_default_dtype() if each is torch.float32 else each for each in args), **options)

    def drawn(shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    family._standard_normal = drawn
    Tensor.float, Tensor.to = (lambda tensor: kept(tensor, torch.float32)), kept
    try:
        yield
    finally:
        family._standard_normal, Tensor.float, Tensor.to = before, as_float, to


def without_dropout(row: Any) -> Any:
    """Set every rate of dropout in the module of a row to zero."""
    for each in row.module.modules():
        if isinstance(each, torch.nn.modules.dropout._DropoutNd):
            each.p = 0.0
        elif isinstance(getattr(each, "dropout", None), float):  # attention, recurrent layers
            each.dropout = 0.0
    return row
