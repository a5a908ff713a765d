"""Published LightningModules, one file a package: how each is made, and on what batches it is tried."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

STEPS = 3


class Row(NamedTuple):
    """A module as its package makes it, and its two levels.

    Attributes:
        module: any LightningModule.
        batches: for the inner and the outer level.
        inner: names or patterns of its parameters, as ``bilevel`` takes them.
        outer: likewise.
        lr: of the inner steps.
        losses: ``inner_loss`` and ``outer_loss`` where they are not the training step.
        detaches: whether a loss stops gradients on purpose, or has other ones than its differences, so that finite
            differences see other things than there are to find.
        validates: whether its own validation step runs under Lightning's Trainer.
    """

    module: Any
    batches: Sequence[Any]
    inner: Any
    outer: Any
    lr: float = 0.05
    losses: Mapping[str, Any] = {}
    detaches: bool = False
    validates: bool = True


Rows = Mapping[str, Callable[[], Row]]
"""By name of the module's class, and what else tells it from another row."""


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """Return a batch of any kind with its floating-point tensors in another dtype."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if hasattr(batch, "apply"):  # a graph of torch_geometric
        return batch.clone().apply(lambda tensor: cast(tensor, dtype))
    if isinstance(batch, Mapping):
        return type(batch)({key: cast(value, dtype) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(cast(value, dtype) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(cast(value, dtype) for value in batch)
    if is_dataclass(batch):
        copied = copy.copy(batch)
        for each in fields(batch):
            setattr(copied, each.name, cast(getattr(batch, each.name), dtype))
        return copied
    return batch
