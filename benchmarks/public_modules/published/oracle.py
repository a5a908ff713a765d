"""The derivative of h along a direction, by a loop in plain PyTorch that shares no code with the library.

Levels are found by name, inner steps are gradient descent, the training step is called as Lightning would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass
class Problem:
    """h(φ), a loop in plain PyTorch.

    Attributes:
        make: makes a module.
        state: its parameters and buffers, at φ and the start of θ.
        batches: the inner one and the outer one.
        inner: patterns of θ's names.
        outer: patterns of φ's names.
        direction: v, by name.
        lr: of an inner step.
        steps: T.
        inner_loss: of a module and a batch.
        outer_loss: likewise.
    """

    make: Callable[[], Any]
    state: dict[str, Tensor]
    batches: Sequence[Any]
    inner: Any
    outer: Any
    direction: dict[str, Tensor]
    lr: float
    steps: int
    inner_loss: Loss = training_step
    outer_loss: Loss = training_step

    def difference(self, step_size: float) -> float:
        """Return (h(φ + εv) - h(φ - εv)) / 2ε."""
        return (self._value(step_size) - self._value(-step_size)) / (2 * step_size)

    def backward(self) -> float:
        """Return ⟨∇h, v⟩ by backpropagation through the loop, where finite differences would see what is detached."""
        module = self._made()
        phi, theta = named(module, self.outer), named(module, self.inner)
        for _ in range(self.steps):
            loss = self._at(module, theta, self.inner_loss, self.batches[0])
            gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {name: each - self.lr * g for (name, each), g in zip(theta.items(), gradients, strict=True)}
        outer = self._at(module, theta, self.outer_loss, self.batches[1])
        gradients = torch.autograd.grad(outer, list(phi.values()))
        return sum((g * self.direction[name]).sum().item() for name, g in zip(phi, gradients, strict=True))

    def _value(self, shift: float) -> float:
        module = self._made()
        with torch.no_grad():
            for name, parameter in named(module, self.outer).items():
                parameter += shift * self.direction[name]
        theta = list(named(module, self.inner).values())
        for _ in range(self.steps):
            gradients = torch.autograd.grad(self.inner_loss(module, self.batches[0]), theta, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(theta, gradients, strict=True):
                    if gradient is not None:
                        parameter -= self.lr * gradient
        return self.outer_loss(module, self.batches[1]).item()

    def _made(self) -> Any:
        """Return a new module: a hidden state, say, that another one keeps in a plain attribute is not carried on."""
        made = self.make().train()
        made.load_state_dict(self.state)
        made.log = made.log_dict = lambda *_, **__: None
        return made

    @staticmethod
    def _at(module: Any, theta: dict[str, Tensor], loss: Loss, batch: Any) -> Tensor:
        holder = torch.nn.Module()
        holder.module, holder.forward = module, lambda: loss(module, batch)
        return torch.func.functional_call(holder, {f"module.{name}": each for name, each in theta.items()}, ())


@contextmanager
def deterministic_and_precise() -> Iterator[None]:
    """Let reparameterized samples be the same numbers in every call, by shape, and nothing round float64 to float32."""
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
