"""A fit: what ties a bilevel module to its strategy and its Trainer, and one estimate in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.surrogate import surrogate_loss
from lightning_bilevel.compiled import Compiler
from lightning_bilevel.data.inputs import check_episodes
from lightning_bilevel.data.loaders import prepare_episodes
from lightning_bilevel.errors import MisconfigurationError, NoLossError, combination_error, missing_error, refuse
from lightning_bilevel.host import LightningModule, Trainer, rank_zero_info, rank_zero_warn
from lightning_bilevel.modules.examine import examination_of
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.modules.hooks import BilevelHooks
from lightning_bilevel.modules.levels import abbreviate
from lightning_bilevel.modules.makeup import Makeup
from lightning_bilevel.modules.outputs import together
from lightning_bilevel.modules.recorder import LogRecorder
from lightning_bilevel.problem import Episode, Hypergradient
from lightning_bilevel.randomness import Call, Key, seed_of
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.training.estimating import Reach, estimated
from lightning_bilevel.training.memory import FitMemory
from lightning_bilevel.training.modes import modes_of
from lightning_bilevel.training.monitor import HypergradientMonitor
from lightning_bilevel.training.own_numbers import OwnNumbers
from lightning_bilevel.training.parallel import Ranks, parallel_refusals
from lightning_bilevel.training.precision import warn_of_precision
from lightning_bilevel.training.rollback import Rollback, after_each_batch
from lightning_bilevel.training.uncompiled import uncompiled
from lightning_bilevel.tree import Params


class FitContext:
    """The tie between a bilevel module and the callbacks of this package: a module's attribute ``fit_context``.

    It is there from the module's construction on, and holds what goes on from step to step. While a fit runs it has a
    :class:`Fit`.

    Args:
        module: the module.
        training_step: the one function that its class may have for a training step.

    Attributes:
        memory: what goes on from step to step.
    """

    def __init__(self, module: BilevelHooks, training_step: object) -> None:
        self._module, self._training_step = module, training_step
        self.memory = FitMemory()
        self._findings: dict[Any, Any] = {}
        self._prepared: tuple[Makeup, FunctionalModule] | None = None
        self._compiler: Compiler | None = None
        self._monitors: list[HypergradientMonitor] = []
        self._strategy: HypergradientStrategy | None = None
        self._fit: Fit | None = None
        self._put_back: Callable[[], None] = _nothing
        self._unshadow: Callable[[], None] = _nothing

    def __deepcopy__(self, memo: dict[int, Any]) -> FitContext:
        # A copy of the module (SWA, EMA) is not in the fit, and none of its parameters is frozen by it.
        copied = FitContext(copy.deepcopy(self._module, memo), self._training_step)
        copied.memory = copy.deepcopy(self.memory, memo)
        for name in self._fit.frozen if self._fit is not None else ():
            copy.deepcopy(self._module.get_parameter(name), memo).requires_grad_(True)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        of_fit: dict[str, Any] = {
            "_monitors": [],
            "_strategy": None,
            "_fit": None,
            "_put_back": _nothing,
            "_unshadow": _nothing,
        }
        return {**vars(self), **of_fit, "_findings": {}, "_prepared": None, "_compiler": None}

    @property
    def fit(self) -> Fit:
        """The running fit.

        Raises:
            MisconfigurationError: no strategy is among the callbacks.
        """
        if self._fit is None:
            raise missing_error(
                type(self._module).__name__,
                "hypergradient strategy",
                "Add one to the Trainer: `pl.Trainer(callbacks=[ReverseUnroll()])`",
            )
        return self._fit

    def functional(self) -> FunctionalModule:
        """Return the module's pure functions: those of the running fit, or those of the last call while they hold."""
        if self._fit is not None:
            return self._fit.functional
        if self._prepared is not None and self._prepared[0].holds():
            return self._prepared[1]
        refuse(self._module.missing_hooks())
        # What the hooks log meanwhile has nowhere to go yet.
        with LogRecorder().recording(self._module):
            functional = FunctionalModule(self._module, self._findings)
        if self._module.compiles_steps:
            functional.compiler = self._compiler = self._compiler or Compiler()
        self._prepared = Makeup(self._module), functional
        return functional

    def begin(self, strategy: HypergradientStrategy, trainer: Trainer) -> None:
        """Prepare a fit: check the combination, and freeze inner-only parameters before DDP wraps the module.

        Freezing waits until ``setup`` and ``configure_model`` have run, for the module may build its layers there.
        """
        if self._strategy is not None and self._strategy is not strategy:
            raise combination_error(
                f"`{type(self._strategy).__name__}` and `{type(strategy).__name__}` in one Trainer",
                "a training step takes one hypergradient",
                "Keep one in `callbacks`, or put both in a `HypergradientSchedule`",
            )
        uncompiled(self._module)
        refuse(self._refusals(strategy, trainer))
        warn_of_precision(trainer)
        self._strategy = strategy
        seed = int(trainer.strategy.broadcast(torch.initial_seed())) % 2**63
        start = partial(self._start, strategy, trainer, seed)
        self._once_after("setup", partial(self._after_layers, start))
        self._once_after("on_train_start", lambda: prepare_episodes(trainer))

    def end(self) -> None:
        """Give the module back as it was."""
        for hook in ("setup", "configure_model", "on_train_start"):
            self._module.__dict__.pop(hook, None)
        self._put_back()
        self._unshadow()
        self._put_back = self._unshadow = _nothing
        if self._fit is not None:
            self._fit.undo()
        self._strategy = self._fit = None
        self._module._let_go()

    def watch(self, monitor: HypergradientMonitor) -> None:
        """Let a monitor see the estimates of the coming fit."""
        self._monitors.append(monitor)

    def forget(self, monitor: HypergradientMonitor) -> None:
        """Undo :meth:`watch`."""
        self._monitors = [each for each in self._monitors if each is not monitor]

    def before_optimizer_step(self) -> None:
        """Take back the gradient of a step whose estimates were all skipped."""
        self.fit.drop_skipped()

    def epoch_ended(self) -> None:
        """Warn of outer parameters that no episode of the first epoch has reached, once."""
        self.fit.say_unreached()

    def state_dict(self) -> dict[str, Any]:
        """Return what goes on from step to step, for a checkpoint."""
        return self.memory.state_dict(self._module.inner_start)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Restore :meth:`state_dict`; ``None`` begins anew from weights that were loaded since the fit was prepared."""
        if state is not None:
            functional = self._fit.functional if self._fit is not None else None
            self.memory.load_state_dict(state, self._module.device, functional)
        elif self._fit is not None:
            self.memory.begin(self._fit.functional, self._fit.seed)

    def _refusals(self, strategy: HypergradientStrategy, trainer: Trainer) -> list[MisconfigurationError]:
        """Return what is wrong with a fit before the module's layers need to exist."""
        module = self._module
        found = [*module.missing_hooks(), *parallel_refusals(strategy, trainer)]
        if getattr(module.training_step, "__func__", None) is not self._training_step:
            found.append(
                combination_error(
                    f"an overridden `{type(module).__name__}.training_step`",
                    "the training step of a `BilevelModule` is the hypergradient estimate",
                    "Write `inner_loss(batch)` and `outer_loss(batch)` instead",
                )
            )
        if not module.automatic_optimization:
            found.append(
                combination_error(
                    "manual optimization with a `BilevelModule`",
                    "the hypergradient reaches the optimizer through automatic optimization",
                    "Remove `self.automatic_optimization = False`",
                )
            )
        return found

    def _once_after(self, hook: str, action: Callable[[], None]) -> None:
        """Shadow a hook on the instance: at its next call, ``action`` follows and the shadow goes."""
        original = getattr(self._module, hook)

        def shadow(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            self._module.__dict__.pop(hook, None)
            action()

        self._module.__dict__[hook] = shadow

    def _after_layers(self, start: Callable[[], None]) -> None:
        # Not shadowed before: other callbacks ask in their own ``setup`` whether the hook is overridden.
        if getattr(self._module.configure_model, "__func__", None) is LightningModule.configure_model:
            start()
        else:
            self._once_after("configure_model", start)

    def _thaw_for_optimizers(self, fit: Fit) -> None:
        """Let ``configure_optimizers``, which comes after DDP has wrapped the module, see the flags of its author."""
        own, original = vars(self._module), self._module.configure_optimizers
        before = {name: own[name] for name in ("configure_optimizers",) if name in own}

        def put_back() -> None:
            own.pop("configure_optimizers", None)
            own.update(before)

        @wraps(original)
        def configure_optimizers() -> Any:
            put_back()
            with fit.thawed():
                return original()

        own["configure_optimizers"] = configure_optimizers
        self._put_back = put_back

    def _start(self, strategy: HypergradientStrategy, trainer: Trainer, seed: int) -> None:
        self._compiler = None  # what an earlier fit could not compile may work now
        functional = self.functional()
        strategy.check(functional.problem)
        self.memory.begin(functional, seed)
        ranks = Ranks(trainer)
        # The processes may have built different layers; Lightning gives them those of rank 0 only after this.
        ranks.begin(list(self.memory.initial.values()))
        self._fit = fit = Fit(functional, self.memory, strategy, ranks, seed, self._monitors)
        if self._module.inner_start == "rollback":
            self._unshadow = after_each_batch(trainer, fit.take_real_steps)
        self._thaw_for_optimizers(fit)


def _nothing() -> None:
    """Do nothing: no hook is shadowed."""


def refuse_repeated_closures(trainer: Trainer, functional: FunctionalModule) -> None:
    """Refuse an outer optimizer that evaluates its closure several times a step where θ goes on from each evaluation.

    θ and the inner optimizer's state would move at every evaluation, so that each sees another function of φ.

    Raises:
        MisconfigurationError: the optimizer is a ``torch.optim.LBFGS``, ``inner_start="warm"``, and there are inner
            parameters that are not shared.
    """
    repeated = [type(each).__name__ for each in trainer.optimizers if isinstance(each, torch.optim.LBFGS)]
    if _goes_on(functional):
        refuse([_repeated(f"the outer optimizer `{name}`") for name in repeated])


def _goes_on(functional: FunctionalModule) -> bool:
    return functional.module.inner_start == "warm" and bool(functional.levels.inner_only)


def _repeated(what: str) -> MisconfigurationError:
    return combination_error(
        f"{what} with `inner_start='warm'`",
        "it evaluates the outer loss several times a step, and θ would move at every evaluation",
        "Use `inner_start='reset'`, or an optimizer that evaluates it once, such as `torch.optim.Adam`",
    )


class Fit:
    """A running fit, from the moment on when the module's layers exist.

    What no outer optimizer steps is frozen, inner-only parameters and those of neither level: DDP, which wraps the
    module after this, waits for the gradients of all others.

    Args:
        functional: the module's pure functions.
        memory: what goes on from step to step.
        strategy: estimates the hypergradients.
        ranks: the processes.
        seed: of all random draws.
        monitors: see some of the estimates.

    Attributes:
        frozen: names of the parameters that the fit has frozen.
    """

    def __init__(
        self,
        functional: FunctionalModule,
        memory: FitMemory,
        strategy: HypergradientStrategy,
        ranks: Ranks,
        seed: int,
        monitors: list[HypergradientMonitor],
    ) -> None:
        self.functional, self.memory, self.strategy = functional, memory, strategy
        self.ranks, self.seed, self._monitors = ranks, seed, monitors
        self.module = functional.module
        self._outputs: dict[str, Any] = {}  # of the last estimate's outer loss, beside its value
        self._left_out = False  # whether a loss was ``None`` since the last step of the outer optimizer
        self._said_none = False
        self._rollback = Rollback(functional, memory)
        self._usable = False  # whether any estimate counts toward the coming step of the outer optimizer
        self._epoch = -1  # in which the modes were looked at
        self._batch = -1  # Lightning's number of the batch that was estimated last
        self._reach = Reach()
        self._numbers = OwnNumbers(self.module)
        self.module._levels = levels = functional.levels
        self._start = self.module.inner_start
        trained = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
        neither = [name for name in trained if name not in {*levels.inner, *levels.outer}]
        self.frozen = [*levels.inner_only, *neither]
        self._constant = [name for name, _ in self.module.named_parameters() if name not in {*trained, *levels.outer}]
        self._require_grad(False)
        if neither:
            rank_zero_info(f"In neither level, and constant in this fit: the parameters {abbreviate(neither)}.")

    def undo(self) -> None:
        """Restore the flags."""
        self.module._levels = None
        self._require_grad(True)

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """Let all parameters have the flags that the author has left them with."""
        self._require_grad(True)
        try:
            yield
        finally:
            self._require_grad(False)

    def _require_grad(self, flag: bool) -> None:
        for name in self.frozen:  # by name, for a move to a device may make new parameters
            self.module.get_parameter(name).requires_grad_(flag)

    def say_unreached(self) -> None:
        """Warn of outer parameters that no episode has reached so far, and look no more."""
        if self._reach.unreached and not self.module.allow_unused:
            rank_zero_warn(f"After an epoch: {self._reach.error(self.functional)}")
        self._reach.unreached = set()

    def estimate(self, batch: Any) -> Hypergradient | None:
        """Return the estimate on a batch, or ``None`` where it is skipped; what goes on is kept, the rest is logged."""
        module, memory, ranks = self.module, self.memory, self.ranks
        self._refuse_second_evaluation()
        self._refuse_changes()
        if self._epoch != module.current_epoch:
            self._epoch, memory.modes = module.current_epoch, modes_of(module)
        key = Key((memory.seed, memory.estimates, 0, ranks.rank))
        call = Call(key, ranks.shard, module.global_step, Key((memory.seed, memory.estimates, 0, 0)))
        episodes: list[Episode] = []

        def own() -> Hypergradient:
            episodes.extend(check_episodes(module.episodes(batch), type(module).__name__))
            return estimated(self.functional, memory, self.strategy, episodes, call, reach=self._reach)

        try:
            result, value = ranks.reduce_estimate(own)
        except NoLossError as error:
            if not self._said_none:
                rank_zero_warn(f"`training_step` returned `None`, for a loss did. {error}")
            self._left_out = self._said_none = True
            memory.estimates += 1  # the next one draws anew
            return None
        except FloatingPointError as error:
            if module.on_nonfinite == "raise" or tree.first_nonfinite(self.functional.phi()) is not None:
                raise
            self._rollback.drop()
            self._skip(error)
            return None
        if ranks.shard[1] > 1:
            result = self.strategy.averaged(result)
        self._outputs = together(self.functional.recorder.outputs)
        theirs = self.functional.recorder.replay(module, batch_size=len(episodes))
        metrics = {**result.metrics, "hypergradient_norm": tree.norm(result.grads)}
        kept = [value for values in result.kept.values() for value in values.values()]
        if memory.estimates == 0 and not any(map(torch.any, kept)) and not metrics["hypergradient_norm"]:
            rank_zero_warn(
                "The first hypergradient is exactly zero, so that nothing is learned from it. `audit(module, batch)` "
                "says which strategies see how the outer parameters act; finite differences may be lost in rounding."
            )
        if memory.estimates == 0:
            self._say_kind(episodes[0])
        for monitor in self._monitors:
            if memory.estimates % monitor.every_n_steps == 0:
                again = partial(self._again, episodes, key)
                metrics |= ranks.raise_on_all(partial(monitor.compare, self.strategy, result, again))
        if self._rollback.holds(module.trainer):
            self._rollback.hold(episodes, key, result)
            ranks.average_(memory.keep_strategy(result))
        else:
            ranks.average_(memory.keep(self.functional, result, len(episodes)))
        memory.estimates += 1
        self._usable = True
        if not module.trainer.barebones:  # there, logging does nothing but warn
            # What the losses log by a name of ours is theirs, with the options that they give it.
            if "outer_loss" not in theirs:
                self._numbers.log({"outer_loss": value}, len(episodes), prog_bar=True)
            self._numbers.log({k: v for k, v in metrics.items() if k not in theirs}, len(episodes))
        self._log_skipped()
        return result

    def _say_kind(self, episode: Episode) -> None:
        """Say how the outer parameters act, and warn where the inner problem does not depend on any."""
        found = examination_of(self.functional, self.memory.values(self.functional), episode)
        if kind := found.kind():
            rank_zero_info(kind)
        if found.one_level and not self.module.allow_unused:
            rank_zero_warn(
                "The inner problem does not depend on the outer parameters: neither `inner_loss`, nor where θ starts, "
                "nor the inner optimizer reads them, so that the hypergradient is the gradient of the outer loss at "
                "a θ that they do not move. Is what they weigh in `outer_loss` meant for `inner_loss`?"
            )

    def take_real_steps(self) -> None:
        """Take the inner steps of the last batch with the new φ, where they have been virtual so far."""
        try:
            state = self.ranks.raise_on_all(self._rollback.take)
        except FloatingPointError as error:
            if self.module.on_nonfinite == "raise":
                raise
            self.memory.skipped += 1
            if self.memory.skipped == 1:
                rank_zero_warn(f"Left θ where it was, for its steps with the new φ were not finite: {error}")
            return
        if state is not None:
            self.ranks.average_(self.memory.keep_inner(self.functional, state, 1))

    def _refuse_changes(self) -> None:
        """Refuse what has been changed since the fit began and cannot be followed."""
        module, outer = self.module, self.functional.levels.outer
        if module.inner_start in ("reset", "rollback") and module.inner_start != self._start:
            lacking = {"reset": "the values at its start were not kept", "rollback": "it was not prepared for that"}
            raise combination_error(
                f"`inner_start={module.inner_start!r}` set during the fit",
                lacking[module.inner_start],
                f"Start with {module.inner_start!r} and set {self._start!r} first",
            )
        if not any(module.get_parameter(name).requires_grad for name in outer):
            raise combination_error(
                "all outer parameters frozen during the fit", "nothing is left to learn", "End the fit, or leave some"
            )
        thawed = [name for name in self._constant if module.get_parameter(name).requires_grad]
        if thawed:
            raise combination_error(
                f"`{thawed[0]}` thawed during the fit",
                "the levels are those of its start, so that it would stay constant",
                "Thaw it before `trainer.fit`, or go on in a second fit",
            )

    def output(self, result: Hypergradient | None) -> Any:
        """Return what a training step returns: the outer loss with the estimate as its gradient, and what is beside it.

        Where the estimate was skipped the loss is nan with zeros, for Lightning refuses ``None`` in more than one
        process; :meth:`drop_skipped` undoes the zeros. Where a loss was ``None`` in one process, so is this.
        """
        outputs, self._outputs = self._outputs, {}
        if result is not None:
            loss = self._surrogate(result.value, result.grads)
            return {"loss": loss, **outputs} if outputs else loss
        if self._left_out and self.module.trainer.world_size == 1:
            return None
        phi = self.functional.phi()
        return self._surrogate(next(iter(phi.values())).new_tensor(float("nan")), tree.zeros_like(phi))

    def drop_skipped(self) -> None:
        """Let the outer optimizer leave its parameters alone if every estimate for this step was skipped.

        A gradient of zeros would still move them: by momentum, or weight decay.
        """
        if (self._left_out or self.module.on_nonfinite == "skip") and not self._usable:
            for name in self.functional.levels.outer:
                self.module.get_parameter(name).grad = None
        self._usable = self._left_out = False

    def _refuse_second_evaluation(self) -> None:
        """Refuse any outer optimizer that runs its closure again, when it does, where θ would go on from it."""
        number = self.module.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if number == self._batch and _goes_on(self.functional):
            raise _repeated("an outer optimizer that runs its closure again")
        self._batch = number

    def _surrogate(self, value: Tensor, grads: Params) -> Tensor:
        names = self.functional.levels.outer
        parameters = [self.functional.swapper.current(name) for name in names]
        return surrogate_loss(value, [grads[name] for name in names], parameters)

    def _skip(self, error: FloatingPointError) -> None:
        """Count a step without an estimate; what goes on is as it was before."""
        self.memory.estimates += 1  # the next one draws anew
        self.memory.skipped += 1
        if self.memory.skipped == 1:
            rank_zero_warn(f"Skipped an outer step, and will skip others like it (see `skipped_steps`): {error}")
        self._log_skipped()

    def _log_skipped(self) -> None:
        if self.module.on_nonfinite == "skip" and not self.module.trainer.barebones:
            self.module.log("skipped_steps", float(self.memory.skipped), prog_bar=True, batch_size=1)

    def _again(
        self, episodes: list[Episode], masks: Key, strategy: HypergradientStrategy, number: int
    ) -> Hypergradient:
        """Return one more estimate at the present step: the same masks, directions of its own."""
        key = Key((seed_of(self.memory.seed, 0, number, 0, 0), self.memory.estimates, 0, 0))
        call = Call(key, step=self.module.global_step)
        return estimated(self.functional, self.memory, strategy, episodes, call, masks)
