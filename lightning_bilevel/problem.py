"""What a hypergradient strategy sees: a bilevel problem as pure functions of named tensors.

Inner parameters θ and outer parameters φ are ``Params``. The problem is

    min_φ h(φ) = f(θ_T(φ), φ),    θ_t = Ω_t(θ_{t-1}, φ),    θ_0 = Ω_0(φ),

with inner loss g (inside Ω), outer loss f and inner steps T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.inner_optimizers.base import Slots
from lightning_bilevel.tree import Params

Batch = Any


class Episode(NamedTuple):
    """One inner problem and the outer batch that judges its solution.

    A ``NamedTuple``, so that Lightning moves it to the device like any batch.

    Attributes:
        inner: the inner batches in order; cycled when there are fewer than inner steps.
        outer: the batch for the outer loss.

    >>> Episode(inner=["support"], outer="query")
    Episode(inner=['support'], outer='query')
    """

    inner: Sequence[Batch]
    outer: Batch


@dataclass(frozen=True)
class InnerState:
    """Everything an inner step reads and writes.

    Attributes:
        params: θ, keyed by parameter name.
        buffers: module buffers such as BatchNorm statistics, keyed by buffer name; never differentiated.
        slots: inner optimizer state.
        steps: inner steps taken so far.
    """

    params: Params
    buffers: Params = field(default_factory=dict)
    slots: Slots = field(default_factory=dict)
    steps: int = 0

    def detach(self) -> InnerState:
        """Cut θ and the optimizer state off their graphs."""
        slots = {slot: tree.detach(values) for slot, values in self.slots.items()}
        return replace(self, params=tree.detach(self.params), slots=slots)


class Hypergradient(NamedTuple):
    """An estimate of ∇h(φ).

    Attributes:
        value: h(φ), the outer loss at θ_T, a 0-dim tensor.
        grads: the estimate, keyed by outer parameter name, shaped as the parameters.
        state: the inner state after the last step; ``state.params`` is θ_T.
        metrics: 0-dim tensors to log, such as ``inner_loss`` of the last inner step.
    """

    value: Tensor
    grads: Params
    state: InnerState
    metrics: dict[str, Tensor]
