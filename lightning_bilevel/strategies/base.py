"""The base of every hypergradient strategy."""

from __future__ import annotations

import traceback
from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_bilevel.errors import MisconfigurationError, combination_error, missing_error, refuse
from lightning_bilevel.host import Callback, Trainer, is_foreign, mixing, rank_zero_warn
from lightning_bilevel.problem import BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call
from lightning_bilevel.tree import Params


class HypergradientStrategy(Callback):
    """Estimates ∇h(φ) for a :class:`~lightning_bilevel.BilevelModule`; one goes into ``Trainer(callbacks=[...])``.

    A subclass implements :meth:`estimate` and states facts about itself as class attributes, which the
    documentation and the tests read. As a callback it only ties itself to the module; everything else
    stays Lightning's.

    Attributes:
        exact: whether the estimate equals ∇h up to rounding.
        unbiased: whether its expectation does.
        requires: what it calls: the whole ``"solve"``, every ``"step"``, or also second derivatives of
            the ``"inner_loss"``. A user's ``solve_inner`` has no steps.
        second_order: whether the user's losses are differentiated twice.
        memory: order of the memory beyond θ and φ, in T, M = dim θ, N = dim φ.
        cost: work per outer step, in inner steps and products.
        direction_parallel: whether directions can be shared out over processes.
        stacks: whether several episodes can be estimated as one stacked problem.

    >>> from lightning_bilevel import FirstOrder
    >>> FirstOrder().exact, FirstOrder().requires, FirstOrder().carried()
    (False, 'solve', [])
    """

    exact: bool
    unbiased: bool
    requires: Literal["solve", "step", "inner_loss"]
    second_order: bool
    memory: str
    cost: str
    direction_parallel: bool = False
    stacks: bool = True

    @abstractmethod
    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return an estimate of ∇h(φ) on one episode (or several, stacked).

        Args:
            problem: pure functions of named tensors; ``problem.start(memory, phi)`` is θ_0.
            memory: what the inner level carries over from before.
            phi: outer parameters, detached.
            episode: inner and outer batches.
            call: names the estimate, so that random directions are repeatable.
        """

    def refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what this strategy in particular cannot work with in ``problem``; nothing by default."""
        return []

    def check_trainer(self, trainer: Trainer) -> None:
        """Raise if this strategy cannot work in ``trainer``; nothing by default."""

    def carried(self) -> list[Tensor]:
        """Return the tensors that this strategy carries from step to step; none by default.

        With ``Trainer(strategy="ddp")`` they are averaged over processes after each step, in place.
        """
        return []

    def all_refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what follows from the facts about this class, and :meth:`refusals`."""
        found = self.refusals(problem)
        name = f"`{type(self).__name__}` with `solve_inner`"
        if problem.solver is not None and self.requires == "step":
            found.append(
                combination_error(
                    name, "your solver has no inner steps", "Use `ImplicitGradient`, `PZOBO` or `ZerothOrder`"
                )
            )
        elif problem.solver is not None and not problem.differentiable_solve and self._differentiates_solve:
            found.append(
                combination_error(
                    f"{name} and `differentiable_solve = False`",
                    "it differentiates through the inner solution",
                    "Use `ZerothOrder`, `PZOBO` or `ImplicitGradient`",
                )
            )
        return found

    def check(self, problem: BilevelProblem) -> None:
        """Raise one report of everything this strategy cannot work with; called before the first batch."""
        refuse(self.all_refusals(problem))

    def __getstate__(self) -> dict[str, Any]:
        # Lightning puts methods of the module here, and a copy would copy the module with them.
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}

    @property
    def _differentiates_solve(self) -> bool:
        return self.requires == "solve" and self.second_order

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Tie this strategy to the module; Lightning calls it before wrapping the module for many processes."""
        if is_foreign(trainer):
            raise combination_error(*mixing(f"`{type(self).__name__}` in a `{type(trainer).__name__}`"))
        if stage != "fit":  # a Trainer that has fitted may evaluate any module
            return
        if not hasattr(pl_module, "attach_strategy"):
            raise missing_error(
                type(pl_module).__name__,
                "inner and outer level",
                f"`{type(self).__name__}` works on a `lightning_bilevel.BilevelModule`: derive from it, "
                "or use `bilevel(module, ...)`",
            )
        self.check_trainer(trainer)
        pl_module.attach_strategy(self, trainer)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Give the module back as it was."""
        if hasattr(pl_module, "detach_strategy"):
            pl_module.detach_strategy()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Take back the gradient of a step whose estimates were all skipped."""
        pl_module.drop_skipped()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the module back as it was; Lightning calls no ``teardown`` after an error."""
        if _is_of_an_unreadable_checkpoint(exception):
            exception.args = (
                f"Cannot read the checkpoint {trainer.ckpt_path}: it is cut off, or no checkpoint. A process that is "
                f"killed while it writes leaves such a file. Resume from an earlier one. ({exception})",
            )
        if hasattr(pl_module, "detach_strategy"):
            pl_module.detach_strategy()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save what the inner level carries from step to step."""
        if hasattr(pl_module, "inner_state_dict"):
            checkpoint["lightning_bilevel"] = pl_module.inner_state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore what :meth:`on_save_checkpoint` saved; weights trained otherwise start a fresh inner level."""
        if not hasattr(pl_module, "load_inner_state_dict"):
            return
        saved = checkpoint.get("lightning_bilevel")
        if saved is None and trainer.state.fn == "fit":
            rank_zero_warn(
                "This checkpoint has no inner state, for no hypergradient strategy was there when it was written: "
                "the inner level begins anew, from the checkpoint's weights."
            )
        pl_module.load_inner_state_dict(saved)


def _is_of_an_unreadable_checkpoint(exception: BaseException) -> bool:
    """Return whether ``torch.load`` raised, which it does with errors of any kind on what is no checkpoint."""
    if not isinstance(exception, Exception) or isinstance(exception, (OSError, MemoryError)):
        return False
    frames = traceback.walk_tb(exception.__traceback__)
    return any(frame.f_code is torch.load.__code__ for frame, _ in frames)
