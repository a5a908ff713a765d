"""What the inner level carries from one training step to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bilevel import tree
from lightning_bilevel.errors import combination_error, missing_error
from lightning_bilevel.inner_optimizers.base import Slots
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.modules.hooks import InnerStart
from lightning_bilevel.problem import Episode, InnerState
from lightning_bilevel.randomness import RngState, seed_of
from lightning_bilevel.tree import Params

FORMAT = 1
"""Number of the layout of :meth:`InnerMemory.state_dict`; goes up when that changes."""

_INSTEAD = (
    "Resume with what the checkpoint was written with, or begin anew from its weights: "
    "`module.load_state_dict(torch.load(path)['state_dict'])`"
)


@dataclass
class InnerMemory:
    """Where θ that is not shared with the outer level starts, and what is kept for the next start.

    Attributes:
        start: ``"warm"`` continues θ and the inner optimizer's state; ``"reset"`` returns to the values at the
            start of the fit; ``"reinit"`` draws fresh values with every submodule's ``reset_parameters()``.
        slots: the inner optimizer's state, when warm.
        steps: inner steps taken so far, when warm.
        initial: values at the start of the fit, for ``"reset"``.
        estimates: hypergradients estimated so far; numbers the random draws.
        seed: of all random draws.
        skipped: outer steps without an estimate, for something in them was not finite.
    """

    start: InnerStart
    slots: Slots = field(default_factory=dict)
    steps: int = 0
    initial: Params = field(default_factory=dict)
    estimates: int = 0
    seed: int = 0
    skipped: int = 0

    def begin(self, functional: FunctionalModule, seed: int) -> None:
        """Start a fit: remember the present values where they will be needed again."""
        self.slots, self.steps, self.estimates, self.seed, self.skipped = {}, 0, 0, seed, 0
        if self.start == "reset":
            present = functional.theta()
            self.initial = {name: present[name].clone() for name in functional.levels.inner_only}
        if self.start == "reinit":
            reinitialized(functional, seed)  # what raises shall do so before the first batch

    def recall(self, functional: FunctionalModule, episode: Episode, count: int = 0, first: int = 0) -> InnerState:
        """Return the state to start from: of one episode (``count=0``) or of ``count`` stacked ones.

        Args:
            functional: the module.
            episode: one episode, to find the buffers that the losses change.
            count: stacked episodes.
            first: position of the first one within the batch.
        """
        buffers = functional.buffers(episode)
        if not count:
            return InnerState(self._values(functional, first), buffers, self._warm_slots(functional), self.steps)
        if self.start == "reinit":
            values = tree.stack([self._values(functional, member) for member in range(first, first + count)])
        else:
            values = _repeated(self._values(functional, first), count)
        return InnerState(values, _repeated(buffers, count))

    def keep(self, functional: FunctionalModule, state: InnerState, count: int) -> list[Tensor]:
        """Write the end of the inner run back into the module, in place.

        Args:
            functional: the module.
            state: θ_T and buffers, stacked where ``count > 1``.
            count: episodes. With several, θ of the episodes has no common value and is dropped; buffers are
                averaged.

        Returns:
            The tensors that now hold what is kept: buffers, inner parameters, the inner optimizer's state.
        """
        with torch.no_grad():
            for name, value in state.buffers.items():
                functional.swapper.current(name).copy_(_average(value) if count > 1 else value)
            if count == 1:
                for name in functional.levels.inner_only:
                    functional.swapper.current(name).copy_(state.params[name])
        if self.start == "warm" and functional.levels.inner_only:
            own = functional.levels.inner_only
            self.slots = {slot: {k: v for k, v in values.items() if k in own} for slot, values in state.slots.items()}
            self.steps = state.steps
        kept = [functional.swapper.current(name) for name in (*state.buffers, *functional.levels.inner_only)]
        return kept + [value for values in self.slots.values() for value in values.values()]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an exact resume needs."""
        return {
            "format": FORMAT,
            "start": self.start,
            "slots": self.slots,
            "steps": self.steps,
            "initial": self.initial,
            "estimates": self.estimates,
            "seed": self.seed,
            "skipped": self.skipped,
        }

    def load_state_dict(
        self, state: dict[str, Any], device: torch.device, functional: FunctionalModule | None = None
    ) -> None:
        """Restore :meth:`state_dict`.

        Args:
            state: from a checkpoint.
            device: where its tensors go.
            functional: the module, where a fit goes on: what it cannot go on with is refused.

        Raises:
            MisconfigurationError: another version of this package has written it, or another kind of inner level.
        """
        number = state.get("format", "none") if isinstance(state, dict) else "none"
        if number != FORMAT:
            because = f"its inner state has the format {number}, and this version of lightning_bilevel reads {FORMAT}"
            raise combination_error("this checkpoint", because, _INSTEAD)
        if missing := sorted(set(self.state_dict()) - set(state)):
            raise combination_error("this checkpoint", f"its inner state lacks {missing}", _INSTEAD)
        if functional is not None:
            self._refuse_another_level(state, functional)
        self.slots = {slot: tree.to(values, device) for slot, values in state["slots"].items()}
        self.initial = tree.to(state["initial"], device)
        self.steps, self.estimates, self.seed = state["steps"], state["estimates"], state["seed"]
        self.skipped = state["skipped"]

    def _refuse_another_level(self, state: dict[str, Any], functional: FunctionalModule) -> None:
        if state["start"] != self.start:
            raise combination_error(
                f"`inner_start={self.start!r}` with this checkpoint",
                f"its fit ran with {state['start']!r}",
                _INSTEAD,
            )
        expected = functional.problem.init_slots(functional.theta(), functional.phi())
        kept, wanted = _shapes(state["slots"]), _shapes(expected, functional.levels.inner_only)
        if kept and kept != wanted:
            raise combination_error(
                "this inner optimizer with this checkpoint",
                f"the one of its fit kept {_described(kept)}, and this one keeps {_described(wanted)}",
                _INSTEAD,
            )

    def _warm_slots(self, functional: FunctionalModule) -> Slots:
        # A callback's ``setup`` and a checkpoint's load come before Lightning moves the module.
        return {slot: tree.to(values, functional.device) for slot, values in self.slots.items()}

    def _values(self, functional: FunctionalModule, episode: int) -> Params:
        names = functional.levels.inner_only
        if not names:
            return {}
        if self.start == "reinit":
            return reinitialized(functional, seed_of(self.seed, self.estimates, episode, 0, 0))
        present = functional.theta()
        if self.start == "reset" and self.initial:
            return {name: value.to(present[name]) for name, value in self.initial.items()}
        return {name: present[name] for name in names}


def reinitialized(functional: FunctionalModule, seed: int) -> Params:
    """Return fresh values of the inner-only parameters from their submodules' own ``reset_parameters()``."""
    module, own = functional.module, set(functional.levels.inner_only)
    fresh = {name: value.clone() for name, value in functional.theta().items() if name in own}
    with RngState(functional.device).fork(seed), torch.no_grad(), functional.swapper.swapped(fresh):
        for prefix, child in module.named_modules():
            names = own & {f"{prefix}.{name}" if prefix else name for name in child._parameters}
            reset = getattr(child, "reset_parameters", None) or getattr(child, "_reset_parameters", None)
            if names and reset is not None:
                _reset(reset, child)
            elif names - set(module.initial_inner_parameters()):
                raise missing_error(
                    type(child).__name__,
                    f"`reset_parameters()`, which `inner_start='reinit'` calls for {sorted(names)}",
                    "Define it, or return these from `initial_inner_parameters()`",
                )
    return fresh


def _reset(reset: Any, child: nn.Module) -> None:
    """Call a reset method, with swapped-in tensors changed in place whatever the method does with buffers."""
    buffers = dict(child._buffers)
    child._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        reset()
    finally:
        child._buffers.update(buffers)


def _repeated(values: Params, count: int) -> Params:
    """Repeat every tensor along a new first dimension, as copies: functions of the user may write to them."""
    return tree.map(torch.clone, tree.expand(values, count))


def _average(stacked: Tensor) -> Tensor:
    return stacked.mean(0) if stacked.is_floating_point() else stacked[0]


def _shapes(slots: Slots, names: Sequence[str] | None = None) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        slot: {name: tuple(values[name].shape) for name in (values if names is None else names)}
        for slot, values in slots.items()
    }


def _described(shapes: dict[str, dict[str, tuple[int, ...]]]) -> str:
    parameters = len({name for named in shapes.values() for name in named})
    return f"{sorted(shapes)} for {parameters} parameters" if shapes else "nothing"
