"""The base of every hypergradient strategy."""

from __future__ import annotations

import traceback
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from lightning_bilevel.data.loaders import refuse_no_batches
from lightning_bilevel.errors import MisconfigurationError, combination_error, missing_error, of_an_instance, refuse
from lightning_bilevel.host import Callback, Trainer, is_foreign, mixing, notice_other_namespace, rank_zero_warn
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient
from lightning_bilevel.randomness import Call
from lightning_bilevel.tree import Params

Differentiates = Literal["run", "inner_gradient"]


@runtime_checkable
class FitContext(Protocol):
    """What a bilevel module's ``fit_context`` offers to the callbacks of this package."""

    def begin(self, strategy: HypergradientStrategy, trainer: Trainer) -> None:
        """Tie ``strategy`` to the module; refuse what cannot work."""

    def end(self) -> None:
        """Give the module back as it was."""

    def before_optimizer_step(self) -> None:
        """Take back the gradient of a step whose estimates were all skipped."""

    def epoch_ended(self) -> None:
        """Say what the first epoch has shown."""

    def state_dict(self) -> dict[str, Any]:
        """Return what goes on from step to step, for a checkpoint."""

    def restore(self, state: dict[str, Any] | None) -> None:
        """Restore :meth:`state_dict`; ``None`` begins anew from the weights of the checkpoint."""


class HypergradientStrategy(Callback):
    """Estimates ∇h(φ) for a :class:`~lightning_bilevel.BilevelModule`; one goes into ``Trainer(callbacks=[...])``.

    A subclass implements :meth:`estimate` and states facts about itself as class attributes, which refusals, the
    documentation and the tests read. It holds settings only: what goes on from step to step is a value that
    :meth:`estimate` takes and returns. As a callback it only ties itself to the module; everything else stays
    Lightning's.

    Attributes:
        exact: whether the estimate equals ∇h up to rounding.
        unbiased: whether its expectation does.
        differentiates: what it takes derivatives of that are derivatives themselves: the ``"run"`` of inner steps,
            the ``"inner_gradient"``, both or neither.
        needs_steps: whether it needs steps of an inner optimizer; a user's ``solve_inner`` has none.
        memory: order of the memory beyond θ and φ, in T, M = dim θ, N = dim φ.
        cost: work per outer step, in inner steps and products.
        direction_parallel: whether directions can be shared out over processes.
        weighs_steps: whether it takes an outer loss that is weighed at every inner step (``outer_loss_weights``).
        supports_stacking: whether several episodes can be estimated as one stacked problem.
        one_slope: whether the estimate is (∇h · v) v, exactly, of one direction v: what a finite difference can check.

    >>> from lightning_bilevel import FirstOrder
    >>> FirstOrder().exact, FirstOrder().differentiates, FirstOrder().needs_steps
    (False, frozenset(), False)
    """

    exact: bool
    unbiased: bool
    differentiates: frozenset[Differentiates]
    needs_steps: bool = False
    memory: str
    cost: str
    direction_parallel: bool = False
    weighs_steps: bool = False
    supports_stacking: bool = True
    one_slope: bool = False

    @property
    def state_key(self) -> str:
        """The name of this callback, which a Trainer asks for when it is made, of another namespace, too."""
        notice_other_namespace()
        return super().state_key

    @abstractmethod
    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return an estimate of ∇h(φ) on one episode (or several, stacked).

        Args:
            problem: pure functions of named tensors; ``problem.start(carry.inner, phi)`` is θ_0.
            carry: what goes on from the last estimate: the inner level's, and what this strategy returned as
                :attr:`Hypergradient.kept`.
            phi: outer parameters, detached.
            episode: inner and outer batches.
            call: names the estimate, so that random directions are repeatable.
        """

    def averaged(self, result: Hypergradient) -> Hypergradient:
        """Return an estimate with what it carries brought up to date; as it is by default.

        Called with the mean over several episodes, or over processes that share out directions: what :meth:`estimate`
        made of a part does not hold there, if it depends on the estimate itself.
        """
        return result

    def explained(self, result: Hypergradient, cosine: float) -> dict[str, torch.Tensor]:
        """Return what an estimate says about its own quality, 0-dim tensors by name; nothing by default.

        Args:
            result: the estimate.
            cosine: the cosine with ∇h that is wanted.
        """
        return {}

    def small(self, outer_size: int) -> HypergradientStrategy:
        """Return what stands for this strategy in the audit: quick, and failing where this one does. Default: itself.

        Args:
            outer_size: N, the number of outer parameters' entries.
        """
        return self

    def members(self) -> Mapping[str, HypergradientStrategy]:
        """Return the strategies that this one is made of, by name; none by default.

        What concerns them too, refusals, checks of the Trainer and what is carried, is done for each.
        """
        return {}

    def refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what this strategy in particular cannot work with in ``problem``; nothing by default."""
        return []

    def trainer_refusals(self, trainer: Trainer) -> list[MisconfigurationError]:
        """Return what this strategy cannot work with in ``trainer``; nothing by default."""
        return []

    @property
    def second_order(self) -> bool:
        """Whether the user's losses are differentiated twice, by this strategy or a member."""
        return bool(self.all_differentiates)

    @property
    def all_differentiates(self) -> frozenset[Differentiates]:
        """:attr:`differentiates`, of this strategy and all members."""
        return self.differentiates.union(*(member.all_differentiates for member in self.members().values()))

    def all_refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what follows from the facts, :meth:`refusals`, and those of all members."""
        found = [*self._refused_solver(problem), *self._refused_weights(problem), *self.refusals(problem)]
        for member in self.members().values():
            found += member.all_refusals(problem)
        return found

    def all_trainer_refusals(self, trainer: Trainer) -> list[MisconfigurationError]:
        """Return :meth:`trainer_refusals`, and those of all members."""
        found = list(self.trainer_refusals(trainer))
        for member in self.members().values():
            found += member.all_trainer_refusals(trainer)
        return found

    def check(self, problem: BilevelProblem) -> None:
        """Raise one report of everything this strategy cannot work with."""
        refuse(self.all_refusals(problem))

    def __getstate__(self) -> dict[str, Any]:
        # Lightning puts methods of the module here, and a copy would copy the module with them.
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}

    def _refused_solver(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        name = f"`{type(self).__name__}` with `solve_inner`"
        if problem.solver is None:
            return []
        if self.needs_steps:
            instead = alternatives(lambda kind: not kind.needs_steps and "run" not in kind.differentiates)
            return [combination_error(name, "your solver has no inner steps", instead)]
        if not problem.traits.differentiable_solve and "run" in self.differentiates:
            instead = alternatives(lambda kind: not kind.needs_steps and "run" not in kind.differentiates)
            what = f"{name} and `differentiable_solve = False`"
            return [combination_error(what, "it differentiates through the inner solution", instead)]
        return []

    def _refused_weights(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        if problem.outer_loss_weights is None:
            return []
        if problem.solver is not None:
            because = "your solver has no inner steps at which the outer loss could be weighed"
            instead = "Leave `outer_loss_weights` out, or the solver"
            return [combination_error("`outer_loss_weights` with `solve_inner`", because, instead)]
        if self.weighs_steps:
            return []
        what = f"`{type(self).__name__}` with `outer_loss_weights`"
        instead = alternatives(lambda kind: kind.weighs_steps)
        return [combination_error(what, "it judges the end of the inner run only", instead)]

    @of_an_instance
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Tie this strategy to the module; Lightning calls it before wrapping the module for many processes."""
        if is_foreign(trainer):
            raise combination_error(*mixing(f"`{type(self).__name__}` in a `{type(trainer).__name__}`"))
        if stage != "fit":  # a Trainer that has fitted may evaluate any module
            return
        context = _context(pl_module)
        if context is None:
            raise missing_error(
                type(pl_module).__name__,
                "inner and outer level",
                f"`{type(self).__name__}` works on a `lightning_bilevel.BilevelModule`: derive from it, "
                "or use `bilevel(module, ...)`",
            )
        refuse(self.all_trainer_refusals(trainer))
        context.begin(self, trainer)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Give the module back as it was."""
        if (context := _context(pl_module)) is not None:
            context.end()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Take back the gradient of a step whose estimates were all skipped."""
        if (context := _context(pl_module)) is not None:
            context.before_optimizer_step()

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse a fit that is over because there was nothing to fit."""
        refuse_no_batches(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Say what the first epoch has shown."""
        if (context := _context(pl_module)) is not None:
            context.epoch_ended()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the module back as it was; Lightning calls no ``teardown`` after an error."""
        if _is_of_an_unreadable_checkpoint(exception):
            exception.args = (
                f"Cannot read the checkpoint {trainer.ckpt_path}: it is cut off, or no checkpoint. A process that is "
                f"killed while it writes leaves such a file. Resume from an earlier one. ({exception})",
            )
        if (context := _context(pl_module)) is not None:
            context.end()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save what goes on from step to step."""
        if (context := _context(pl_module)) is not None:
            checkpoint["lightning_bilevel"] = context.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore what :meth:`on_save_checkpoint` saved; weights trained otherwise start a fresh inner level."""
        if (context := _context(pl_module)) is None:
            return
        saved = checkpoint.get("lightning_bilevel")
        if saved is None and trainer.state.fn == "fit":
            rank_zero_warn(
                "This checkpoint has no inner state, for no hypergradient strategy was there when it was written: "
                "the inner level begins anew, from the checkpoint's weights."
            )
        context.restore(saved)


def kept_of(member: str, result: Hypergradient) -> dict[str, Params]:
    """Return what a member carries, under the names by which :meth:`Carry.of` finds it."""
    return {f"{member}/{name}": values for name, values in result.kept.items()}


def every_strategy() -> list[type[HypergradientStrategy]]:
    """Return this package's strategies that estimate by themselves, by name."""
    package = __package__ or ""
    kinds = HypergradientStrategy.__subclasses__()
    for base in (kind for kind in kinds if not hasattr(kind, "exact")):  # it states no facts
        kinds += base.__subclasses__()
    own = [kind for kind in kinds if kind.__module__.startswith(package) and hasattr(kind, "exact")]
    return sorted(own, key=lambda kind: kind.__name__)


def alternatives(where: Any) -> str:
    """Return the advice to use one of the strategies whose facts satisfy ``where``.

    >>> alternatives(lambda kind: kind.unbiased and not kind.exact)
    'Use `ForwardGradient`'
    """
    names = [f"`{kind.__name__}`" for kind in every_strategy() if isinstance(kind.exact, bool) and where(kind)]
    return f"Use {', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else f"Use {names[0]}"


def _context(module: Any) -> FitContext | None:
    context = getattr(module, "fit_context", None)
    return context if isinstance(context, FitContext) else None


def _is_of_an_unreadable_checkpoint(exception: BaseException) -> bool:
    """Return whether ``torch.load`` raised, which it does with errors of any kind on what is no checkpoint."""
    if not isinstance(exception, Exception) or isinstance(exception, (OSError, MemoryError)):
        return False
    frames = traceback.walk_tb(exception.__traceback__)
    return any(frame.f_code is torch.load.__code__ for frame, _ in frames)
