"""``self.log`` inside losses: kept aside while derivatives are taken, logged once afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_bilevel.host import LightningModule


class LogRecorder:
    """Shadows ``log`` and ``log_dict`` of a module, and replays the last value of each name.

    A loss runs many times per training step, also inside function transforms where Lightning's own
    ``log`` raises.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    @contextmanager
    def recording(self, module: LightningModule) -> Iterator[None]:
        """Shadow the methods on the instance; remove the shadows on exit. What was kept before is forgotten."""
        self._last.clear()
        shadowed: dict[str, Any] = {
            name: module.__dict__[name] for name in ("log", "log_dict") if name in module.__dict__
        }
        module.__dict__.update(log=self.log, log_dict=self.log_dict)
        try:
            yield
        finally:
            del module.__dict__["log"], module.__dict__["log_dict"]
            module.__dict__.update(shadowed)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the value for later."""
        self._last[name] = (_primal(value), args, kwargs)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Keep the values for later."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def replay(self, module: LightningModule, batch_size: int) -> None:
        """Log each name once, with the last value it had.

        Args:
            module: the module.
            batch_size: weight of this step in an epoch's mean, unless the call that was kept says otherwise.
        """
        for name, (value, args, kwargs) in self._last.items():
            module.log(name, value, *args, **{"batch_size": batch_size, **kwargs})
        self._last.clear()


def _primal(value: Any) -> Any:
    """Take a value out of function transforms; the mean over episodes where it was vectorized over them."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value.float().mean() if value.ndim else value
