"""``self.log`` inside losses: kept aside while derivatives are taken, logged once afterwards."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_bilevel.host import LightningModule
from lightning_bilevel.problem import Batch, BilevelProblem
from lightning_bilevel.tree import Params

_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class LogRecorder:
    """Shadows ``log`` and ``log_dict`` of a module, and replays each name once.

    A loss runs many times per training step: at every inner step, again where a strategy recomputes or perturbs, and
    inside function transforms, where Lightning's own ``log`` raises. What counts is the last value of a run, which
    lasts from :meth:`begin` to the first outer loss; what is logged outside of runs is dropped.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[int, dict[str, _Call]]] = []
        self._running = False

    @contextmanager
    def recording(self, module: LightningModule) -> Iterator[None]:
        """Shadow the methods on the instance; remove the shadows on exit. What was kept before is forgotten."""
        self._runs, self._running = [], False
        shadowed: dict[str, Any] = {
            name: module.__dict__[name] for name in ("log", "log_dict") if name in module.__dict__
        }
        module.__dict__.update(log=self.log, log_dict=self.log_dict)
        try:
            yield
        finally:
            del module.__dict__["log"], module.__dict__["log_dict"]
            module.__dict__.update(shadowed)

    def begin(self, count: int) -> None:
        """Begin the run of ``count`` episodes."""
        self._runs.append((count, {}))
        self._running = True

    def watched(self, problem: BilevelProblem) -> BilevelProblem:
        """Return ``problem``, whose outer loss ends a run."""

        def outer_loss(theta: Params, phi: Params, batch: Batch, buffers: Params) -> Tensor:
            loss = problem.outer_loss(theta, phi, batch, buffers)
            self._running = False
            return loss

        return replace(problem, outer_loss=outer_loss)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the value for later."""
        if self._running:
            self._runs[-1][1][name] = (_primal(value), args, kwargs)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Keep the values for later."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def replay(self, module: LightningModule, batch_size: int) -> None:
        """Log each name once, with its mean over the episodes.

        Args:
            module: the module.
            batch_size: weight of this step in an epoch's mean, unless the call that was kept says otherwise.
        """
        for name in dict.fromkeys(name for _, calls in self._runs for name in calls):
            calls = [(count, calls[name]) for count, calls in self._runs if name in calls]
            _, (value, args, kwargs) = calls[-1]
            if len(calls) > 1 and isinstance(value, (Tensor, numbers.Number)):
                value = sum(count * call[0] for count, call in calls) / sum(count for count, _ in calls)
            module.log(name, value, *args, **{"batch_size": batch_size, **kwargs})
        self._runs = []


def _primal(value: Any) -> Any:
    """Take a value out of function transforms; the mean over episodes where it was vectorized over them."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value.float().mean() if value.ndim else value
