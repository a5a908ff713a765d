"""The numbers that a fit logs of itself at every step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_bilevel.host import LightningModule
from lightning_bilevel.tree import Params


class OwnNumbers:
    """Logs numbers by ``self.log``; again, by the metrics that Lightning has made of them then.

    ``self.log`` finds out at every call what a number is logged as, and moves the metric to the device where it is:
    some 0.3 ms on a slow machine, several times a step. Of the same name, from the same hook, on the same device, the
    answers are the same. Where the module has a ``log`` of its own, it gets every number.

    Args:
        module: the module.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._metrics: dict[str, Any] = {}

    def log(self, numbers: Params, batch_size: int, *, prog_bar: bool = False) -> None:
        """Log detached numbers, ``()`` each, from within the training step.

        Args:
            numbers: by name; a name stays in the progress bar, or out of it.
            batch_size: their weight in an epoch's mean.
            prog_bar: whether they are in the progress bar.
        """
        module = self._module
        if not self._is_lightnings():
            module.log_dict(numbers, prog_bar=prog_bar, batch_size=batch_size)
            return
        trainer: Any = module.trainer
        results, hook = trainer._results, module._current_fx_name
        again = trainer._logger_connector._current_fx == hook  # else an epoch begins, and metrics are reset
        for name, value in numbers.items():
            key = f"{hook}.{name}"
            metric = self._metrics.get(name)
            if again and metric is not None and results.get(key) is metric and _fits(metric, value):
                results.update_metrics(key, value.detach(), batch_size)
            else:
                module.log(name, value, prog_bar=prog_bar, batch_size=batch_size)
                self._metrics[name] = results.get(key)

    def _is_lightnings(self) -> bool:
        kind, own = type(self._module), vars(self._module)
        names = ("log", "log_dict")
        return all(getattr(kind, name) is _LIGHTNINGS[name] and name not in own for name in names)


_LIGHTNINGS = {"log": LightningModule.log, "log_dict": LightningModule.log_dict}


def _fits(metric: Any, value: Tensor) -> bool:
    """Return whether a metric of one number takes this value as it is."""
    there: Any = getattr(metric, "value", None)
    return isinstance(there, Tensor) and not value.ndim and there.device == value.device
