"""What goes on from one training step to the next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bilevel import tree
from lightning_bilevel.errors import combination_error
from lightning_bilevel.inner_optimizers.base import OptState
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.modules.hooks import InnerStart
from lightning_bilevel.modules.reset import check_all_drawn, reset_methods
from lightning_bilevel.problem import Hypergradient, InnerState
from lightning_bilevel.randomness import RngState, seed_of
from lightning_bilevel.tree import Params

FORMAT = 2
"""Number of the layout of :meth:`FitMemory.state_dict`; goes up when that changes."""

_INSTEAD = (
    "Resume with what the checkpoint was written with, or begin anew from its weights: "
    "`module.load_state_dict(torch.load(path)['state_dict'])`"
)


@dataclass
class FitMemory:
    """What goes on from one outer step to the next: of the inner level, and of the hypergradient strategy.

    Where θ that is not shared with the outer level starts, the module's ``inner_start`` says: ``"warm"`` continues θ
    and the inner optimizer's state, ``"rollback"`` too, but by the steps that are taken again after the outer
    optimizer's, ``"reset"`` returns to the values at the start of the fit, ``"reinit"`` draws fresh values with every
    submodule's ``reset_parameters()``.

    Attributes:
        opt_state: the inner optimizer's state, when warm.
        steps: inner steps taken so far, when warm.
        initial: values at the start of the fit, for ``"reset"``.
        strategy: what the hypergradient strategy carries, see :attr:`Hypergradient.kept`.
        estimates: hypergradients estimated so far; numbers the random draws.
        seed: of all random draws.
        skipped: outer steps without an estimate, for something in them was not finite.
        modes: of each part of the module in the last epoch of a fit, see :func:`modes_of`; empty before, and not saved.
    """

    opt_state: OptState = field(default_factory=dict)
    steps: int = 0
    initial: Params = field(default_factory=dict)
    strategy: dict[str, Params] = field(default_factory=dict)
    estimates: int = 0
    seed: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        self.modes: dict[str, bool] = {}  # no field, for a checkpoint has the fields

    def begin(self, functional: FunctionalModule, seed: int) -> None:
        """Start a fit: remember the present values where they will be needed again."""
        self.opt_state, self.steps, self.strategy = {}, 0, {}
        self.estimates, self.seed, self.skipped = 0, seed, 0
        if functional.module.inner_start == "reset":
            present = functional.theta()
            self.initial = {name: present[name].clone() for name in functional.levels.inner_only}
        if functional.module.inner_start == "reinit":
            reinitialized(functional, seed)  # what raises shall do so before the first batch

    def values(self, functional: FunctionalModule, episode: int = 0) -> Params:
        """Return the values that the inner-only parameters of an episode start from, by its place in the batch."""
        names, start = functional.levels.inner_only, functional.module.inner_start
        if not names:
            return {}
        if start == "reinit":
            return reinitialized(functional, seed_of(self.seed, self.estimates, episode, 0, 0))
        present = functional.theta()
        if start == "reset" and self.initial:
            return {name: value.to(present[name]) for name, value in self.initial.items()}
        return {name: present[name] for name in names}

    def recall(self, functional: FunctionalModule, buffers: Iterable[str], episodes: int = 1) -> list[InnerState]:
        """Return the state that each of so many episodes starts from.

        Args:
            functional: the module.
            buffers: names of those that the losses change.
            episodes: their number; what is warm goes on with one only.
        """
        kept = functional.buffers(buffers)
        if episodes == 1 and functional.module.goes_on:
            # A callback's ``setup`` and a checkpoint's load come before Lightning moves the module.
            opt_state = {slot: tree.to(values, functional.device) for slot, values in self.opt_state.items()}
            return [InnerState(self.values(functional), kept, opt_state, self.steps)]
        if functional.module.inner_start == "reinit":
            return [InnerState(self.values(functional, number), kept) for number in range(episodes)]
        return [InnerState(self.values(functional), kept)] * episodes

    def recall_strategy(self, device: torch.device) -> dict[str, Params]:
        """Return what the strategy carries."""
        return {name: _moved(values, device) for name, values in self.strategy.items()}

    def keep(self, functional: FunctionalModule, result: Hypergradient, count: int) -> list[Tensor]:
        """Write the end of the inner run back into the module, in place, and keep what the strategy carries.

        Args:
            functional: the module.
            result: its state is stacked where ``count > 1``.
            count: episodes. With several, θ of the episodes has no common value and is dropped; buffers are
                averaged, and of integers, counters say, the last episode's count.

        Returns:
            The tensors that now hold what is kept: buffers, inner parameters, the inner optimizer's state, the
            strategy's.
        """
        self.strategy = result.kept
        return self.keep_inner(functional, result.state, count) + self._of_strategy()

    def keep_strategy(self, result: Hypergradient) -> list[Tensor]:
        """Keep what the strategy carries alone, as :meth:`keep` does."""
        self.strategy = result.kept
        return self._of_strategy()

    def _of_strategy(self) -> list[Tensor]:
        return [value for values in self.strategy.values() for value in values.values()]

    def keep_inner(self, functional: FunctionalModule, state: InnerState, count: int) -> list[Tensor]:
        """Keep the end of an inner run alone, as :meth:`keep` does."""
        own = functional.levels.inner_only
        with torch.no_grad():
            for name, value in state.buffers.items():
                functional.swapper.current(name).copy_(_average(value) if count > 1 else value)
            if count == 1:
                for name in own:
                    functional.swapper.current(name).copy_(state.params[name])
        if functional.module.goes_on and own:
            self.opt_state = {
                slot: {k: v for k, v in values.items() if k in own} for slot, values in state.opt_state.items()
            }
            self.steps = state.steps
        else:  # set during a fit, a start that goes on begins with a fresh optimizer, not with one of long ago
            self.opt_state, self.steps = {}, 0
        kept = [functional.swapper.current(name) for name in (*state.buffers, *own)]
        return kept + [value for values in self.opt_state.values() for value in values.values()]

    def state_dict(self, start: InnerStart) -> dict[str, Any]:
        """Return everything that an exact resume needs; ``start`` is the module's."""
        return {"format": FORMAT, "start": start, **{each.name: getattr(self, each.name) for each in fields(self)}}

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
        if missing := sorted({"start", *(each.name for each in fields(self))} - set(state)):
            raise combination_error("this checkpoint", f"its inner state lacks {missing}", _INSTEAD)
        if functional is not None:
            _refuse_another_level(state, functional)
        self.opt_state = {slot: tree.to(values, device) for slot, values in state["opt_state"].items()}
        self.initial = tree.to(state["initial"], device)
        self.strategy = {name: _moved(values, device) for name, values in state["strategy"].items()}
        self.steps, self.estimates, self.seed = state["steps"], state["estimates"], state["seed"]
        self.skipped = state["skipped"]


def _refuse_another_level(state: dict[str, Any], functional: FunctionalModule) -> None:
    start = functional.module.inner_start
    if state["start"] != start:
        raise combination_error(
            f"`inner_start={start!r}` with this checkpoint", f"its fit ran with {state['start']!r}", _INSTEAD
        )
    expected = functional.problem.init_opt_state(functional.theta(), functional.phi())
    kept, wanted = _shapes(state["opt_state"]), _shapes(expected, functional.levels.inner_only)
    if kept and kept != wanted:
        raise combination_error(
            "this inner optimizer with this checkpoint",
            f"the one of its fit kept {_described(kept)}, and this one keeps {_described(wanted)}",
            _INSTEAD,
        )


def _moved(values: Params, device: torch.device) -> Params:
    """Move all but counters, which Python reads."""
    exact = (torch.int64, torch.int32, torch.bool)
    return {name: value if value.dtype in exact else value.to(device) for name, value in values.items()}


def reinitialized(functional: FunctionalModule, seed: int) -> Params:
    """Return fresh values of the inner-only parameters from their submodules' own ``reset_parameters()``."""
    module, own = functional.module, set(functional.levels.inner_only)
    fresh = {name: value.clone() for name, value in functional.theta().items() if name in own}
    with RngState(functional.device).fork(seed), torch.no_grad(), functional.swapper.swapped(fresh):
        for child, _, reset in reset_methods(module, own):
            if reset is not None:
                _reset(reset, child)
        if not module.starts_from_data:  # else where the data are there
            check_all_drawn(module, own, set(module.initial_inner_parameters()))
    return fresh


def _reset(reset: Any, child: nn.Module) -> None:
    """Call a reset method, with swapped-in tensors changed in place whatever the method does with buffers."""
    buffers = dict(child._buffers)
    child._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        reset()
    finally:
        child._buffers.update(buffers)


def _average(stacked: Tensor) -> Tensor:
    return stacked.mean(0) if stacked.is_floating_point() else stacked[-1]


def _shapes(opt_state: OptState, names: Sequence[str] | None = None) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        slot: {name: tuple(values[name].shape) for name in (values if names is None else names)}
        for slot, values in opt_state.items()
    }


def _described(shapes: dict[str, dict[str, tuple[int, ...]]]) -> str:
    parameters = len({name for named in shapes.values() for name in named})
    return f"{sorted(shapes)} for {parameters} parameters" if shapes else "nothing"
