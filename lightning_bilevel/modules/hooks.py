"""What a user of :class:`BilevelModule` overrides: the two levels, their losses, the inner optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_bilevel.errors import MisconfigurationError, missing_error, value_error
from lightning_bilevel.host import LightningModule
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.modules.levels import Levels, parameters, rest
from lightning_bilevel.problem import Batch, Episode

InnerStart = Literal["warm", "reset", "reinit", "rollback"]
OnNonfinite = Literal["raise", "skip"]

_LEVELS = "Add `def inner_parameters(self): return self.net`, or `outer_parameters`, or both"
_FIXES = {
    "inner_parameters": _LEVELS,
    "outer_parameters": _LEVELS,
    "inner_loss": "Add `def inner_loss(self, batch): ...`",
    "outer_loss": "Add `def outer_loss(self, batch): ...`",
    "configure_inner_optimizer": "Add `def configure_inner_optimizer(self): return SGD(lr=0.1)`, "
    "with `from lightning_bilevel.inner_optimizers import SGD`",
    "solve_inner": "Add `def solve_inner(self, batches): ...`",
}
"""The smallest fix for a hook that is missing."""


class BilevelHooks(LightningModule):
    """The hooks of a bilevel module with their defaults; see :class:`BilevelModule` for the whole.

    Attributes:
        differentiable_solve: whether autograd may go through :meth:`solve_inner`.
    """

    differentiable_solve: ClassVar[bool] = True
    inner_start: InnerStart
    on_nonfinite: OnNonfinite

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let callers of an overridden ``inner_parameters`` or ``outer_parameters`` get a list of parameters.

        So that ``torch.optim.Adam(self.outer_parameters())`` works whatever the hook returns, a submodule too.
        """
        super().__init_subclass__(**kwargs)
        for name in ("inner_parameters", "outer_parameters"):
            hook = cls.__dict__.get(name)
            if callable(hook) and hook is not vars(BilevelHooks).get(name):
                setattr(cls, name, _listed(hook, name))

    inner_steps: int
    proximal: float
    allow_unused: bool
    compiles_steps: bool
    episode_chunk_size: int | None
    _levels: Levels | None = None  # known while a fit runs

    def inner_parameters(self) -> Any:
        """Return θ: parameters, submodules, or a list of both. Default: all that :meth:`outer_parameters` leaves.

        Example: ``return self.net``
        """
        return self._other_level("inner", "outer")

    def outer_parameters(self) -> Any:
        """Return φ: parameters, submodules, or a list of both. Default: all that :meth:`inner_parameters` leaves.

        Example: ``return [self.example_weights]``
        """
        return self._other_level("outer", "inner")

    def inner_loss(self, batch: Batch) -> Tensor:
        """Return g(θ, φ), a 0-dim tensor, written against ``self`` as usual.

        Example: ``return F.cross_entropy(self.net(batch[0]), batch[1])``
        """
        raise self._missing("inner_loss")

    def outer_loss(self, batch: Batch) -> Any:
        """Return f(θ_T, φ), a 0-dim tensor, written against ``self``, which computes with θ_T.

        Or a mapping with it at ``"loss"``. The other entries, detached, are in the ``outputs`` of
        ``on_train_batch_end``, of this module and of callbacks; of several episodes, each is a list with one entry per
        episode. In a fit, ``None`` here or from :meth:`inner_loss` skips the step: θ and φ stay as they are, and
        ``outputs`` has no such entries, as Lightning does it where a training step returns ``None``.

        Example: ``return F.cross_entropy(self.net(batch[0]), batch[1])``
        """
        raise self._missing("outer_loss")

    def configure_inner_optimizer(self) -> InnerOptimizer | torch.optim.Optimizer:
        """Return the inner optimizer; called at every inner step with the current φ in place.

        Example: ``return SGD(lr=self.log_lr.exp())``, whose learning rate is an outer parameter. A ``torch.optim``
        instance on ``self.inner_parameters()`` is taken once and converted.
        """
        raise self._missing("configure_inner_optimizer")

    def initial_inner_parameters(self, batches: Sequence[Batch] = ()) -> Mapping[str, Tensor]:
        """Return Ω_0(φ) by parameter name, for those that should not start as ``inner_start`` says.

        Called with φ in place, so the values may depend on it. Shared parameters start at φ by themselves.

        Args:
            batches: the inner batches of the episode, for a start that depends on its data: weights made from the
                support set, an expert's checkpoint. An override may leave the argument out.

        Example: ``return {"head.weight": self.hypernetwork(self.code)}``
        """
        return {}

    @property
    def starts_from_data(self) -> bool:
        """Whether :meth:`initial_inner_parameters` is overridden with an argument, for the inner batches."""
        hook = self.initial_inner_parameters
        if getattr(hook, "__func__", None) is BilevelHooks.initial_inner_parameters:
            return False
        try:
            signature(hook).bind(())
        except TypeError:
            return False
        return True

    def outer_loss_weights(self) -> Sequence[float | Tensor] | Tensor | None:
        """Return w of h(φ) = Σ_t w_t f(θ_t, φ): T numbers, for θ_1 … θ_T. Default, ``None``: f at θ_T alone.

        Called with φ in place, so the weights may be learned, and at every estimate, so they may depend on
        ``self.global_step``. The multi-step loss of MAML++, and how learned optimizers are trained. ``outer_loss`` is
        evaluated after every step whose weight is not a constant zero; what it logs is that of θ_T.

        Example: ``return [1 / self.inner_steps] * self.inner_steps``
        """
        return None

    def episodes(self, batch: Any) -> Sequence[Episode]:
        """Split what the loader yields into episodes. Default: one, or a list of them as it is.

        A mapping ``{"inner": ..., "outer": ...}`` is one episode too; its ``inner`` is one batch, not a list of them.

        Example: ``return [Episode([support], query) for support, query in zip(*batch)]``
        """
        if isinstance(batch, Episode):
            return [batch]
        if isinstance(batch, Mapping) and set(batch) == {"inner", "outer"}:
            return [Episode([batch["inner"]], batch["outer"])]
        if isinstance(batch, (list, tuple)) and batch and all(isinstance(entry, Episode) for entry in batch):
            return list(batch)
        raise value_error(
            "the training batch",
            "an `Episode`, a list of them, or a mapping of 'inner' and 'outer'",
            type(batch).__name__,
            "Let `trainer.fit` or `train_dataloader` have an `EpisodeLoader(inner=..., outer=...)`, or override "
            "`episodes(batch)`.",
        )

    def solve_inner(self, batches: Sequence[Batch]) -> Mapping[str, Tensor]:
        """Return θ_T by parameter name: your own solver in place of the gradient loop.

        Called with φ in place and θ at its start. Differentiable in φ, or set ``differentiable_solve = False`` on
        the class and use a strategy that differentiates nothing.

        Example: ``return {"weight": torch.linalg.solve(x.T @ x + penalty, x.T @ y)}``
        """
        raise self._missing("solve_inner")

    @property
    def goes_on(self) -> bool:
        """Whether θ and the inner optimizer's state go on from one outer step to the next."""
        return self.inner_start in ("warm", "rollback")

    @property
    def has_solver(self) -> bool:
        """Whether :meth:`solve_inner` is overridden."""
        return type(self).solve_inner is not BilevelHooks.solve_inner

    def _let_go(self) -> None:
        """Do what has to be done when a fit is over, by an error too: nothing."""

    def _other_level(self, level: str, other: str) -> Any:
        if self._levels is not None:
            # Inner-only parameters are frozen now, so that "all the rest" cannot be told by their flags. While a loss
            # is evaluated, plain tensors stand in their places, which ``get_parameter`` refuses.
            present = dict(self.named_parameters())
            return [present[name] for name in getattr(self._levels, level)]
        if getattr(type(self), f"{other}_parameters") is getattr(BilevelHooks, f"{other}_parameters"):
            raise self._missing("inner_parameters")
        return rest(self, getattr(self, f"{other}_parameters")(), f"{type(self).__name__}.{other}_parameters()")

    def missing_hooks(self) -> list[MisconfigurationError]:
        """Return an error for every hook that this module needs and does not have."""
        has = {
            hook: getattr(getattr(self, hook), "__func__", None) is not getattr(BilevelHooks, hook) for hook in _FIXES
        }
        has["inner_parameters"] |= has["outer_parameters"]
        needed = ["inner_parameters", "outer_loss"]
        if not has["solve_inner"]:
            needed += ["inner_loss", "configure_inner_optimizer"]
        return [self._missing(hook) for hook in needed if not has[hook]]

    def _missing(self, hook: str) -> MisconfigurationError:
        return missing_error(type(self).__name__, f"`{hook}`", _FIXES[hook])


def _listed(hook: Any, name: str) -> Any:
    """Return a level's hook that lists what it selects."""
    if hasattr(hook, "__wrapped__"):  # `outer_parameters = inner_parameters`
        return hook

    @wraps(hook)
    def listed(self: Any) -> list[Any]:
        return parameters(hook(self), f"{type(self).__name__}.{name}()")

    return listed
