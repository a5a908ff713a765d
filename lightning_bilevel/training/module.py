"""``BilevelModule``: a LightningModule whose training step is one hypergradient estimate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_bilevel import tree
from lightning_bilevel.calculus.inner_loop import run
from lightning_bilevel.data.inputs import outside_inference, some, warn_of_a_bare_batch
from lightning_bilevel.data.loaders import prepare_episodes
from lightning_bilevel.errors import combination_error, integer, missing_error, refuse, value_error
from lightning_bilevel.estimation import estimate, vectorizes
from lightning_bilevel.host import LightningModule, Trainer, rank_zero_warn
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.modules.hooks import BilevelHooks, InnerStart, OnNonfinite
from lightning_bilevel.modules.levels import Levels
from lightning_bilevel.problem import Batch, Episode, Hypergradient, InnerState, stackable
from lightning_bilevel.randomness import Call, Key, RngState, seed_of
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.training.attachment import Attachment, fit_refusals, functional_of
from lightning_bilevel.training.memory import InnerMemory
from lightning_bilevel.training.monitor import HypergradientMonitor
from lightning_bilevel.training.precision import warn_of_precision
from lightning_bilevel.training.surrogate import surrogate_loss
from lightning_bilevel.tree import Params


class BilevelModule(BilevelHooks):
    """Declares an inner and an outer level; a hypergradient strategy among the callbacks does the rest.

    min_φ f(θ_T(φ), φ), where θ_T is the end of ``inner_steps`` optimizer steps on g(θ, φ). Override
    ``inner_parameters`` or ``outer_parameters`` (or both), ``inner_loss``, ``outer_loss``,
    ``configure_inner_optimizer`` and Lightning's ``configure_optimizers`` (which optimizes φ). Lightning's
    automatic optimization receives the hypergradient as the gradient of the outer loss, so that everything a
    Trainer offers works as always.

    A parameter in both levels is a learned initialization: θ starts at φ there (MAML).

    Logged at every training step: ``outer_loss`` (in the progress bar), ``inner_loss`` of the last inner
    step, ``hypergradient_norm``.

    Args:
        inner_steps: T, the number of inner steps.
        inner_start: where inner parameters that are not shared start: ``"warm"`` continues θ and the inner
            optimizer's state; ``"reset"`` returns to the values at the start of the fit; ``"reinit"`` draws fresh ones.
        proximal: λ of the term λ/2 ‖θ − φ‖² added to the inner loss for shared parameters (iMAML).
        episode_chunk_size: episodes of one batch that are vectorized together; ``None`` chooses by device and
            kind of net, 1 loops.
        on_nonfinite: what a nan or an infinity in an estimate does: ``"raise"`` stops with an error that says where it
            came up; ``"skip"`` leaves θ, φ and the outer optimizer's state as they were, and goes on with the next
            episode; ``skipped_steps`` is logged.

    Raises:
        ValueError: a bad argument.

    >>> import torch
    >>> from lightning_bilevel import SGD, Episode, ReverseUnroll, hypergradient
    >>> class Ridge(BilevelModule):
    ...     def __init__(self):
    ...         super().__init__(inner_steps=3, inner_start="reset")
    ...         self.weight = torch.nn.Parameter(torch.zeros(2))
    ...         self.log_penalty = torch.nn.Parameter(torch.tensor(0.0))
    ...     def inner_parameters(self): return [self.weight]
    ...     def inner_loss(self, batch):
    ...         x, y = batch
    ...         return (x @ self.weight - y).square().mean() + self.log_penalty.exp() * self.weight.square().sum()
    ...     def outer_loss(self, batch):
    ...         x, y = batch
    ...         return (x @ self.weight - y).square().mean()
    ...     def configure_inner_optimizer(self): return SGD(lr=0.1)
    >>> batch = torch.eye(2), torch.ones(2)
    >>> estimate = hypergradient(Ridge(), ReverseUnroll(), Episode([batch], batch))
    >>> round(estimate.grads["log_penalty"].item(), 4)
    0.075
    """

    def __init__(
        self,
        inner_steps: int = 1,
        inner_start: InnerStart = "warm",
        proximal: float = 0.0,
        episode_chunk_size: int | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ) -> None:
        super().__init__(inner_steps, inner_start, proximal, episode_chunk_size, on_nonfinite)
        self._memory = InnerMemory(inner_start)
        self._attachment: Attachment | None = None
        self._monitors: list[HypergradientMonitor] = []

    @contextmanager
    def adapted(self, batches: Sequence[Batch], steps: int | None = None) -> Iterator[BilevelModule]:
        """Compute with θ adapted on ``batches`` inside the block; for validation, test and prediction.

        Works under Lightning's inference mode. The module itself is unchanged.

        Args:
            batches: inner batches, as in ``Episode.inner``: a list, also of one.
            steps: inner steps; default ``inner_steps``; 0 is θ_0.

        Raises:
            ValueError: no inner batch, or a bad ``steps``.

        Example:
            ``with self.adapted([support]): logits = self.net(query_x)``

        >>> from lightning_bilevel import SGD
        >>> class Mean(BilevelModule):
        ...     def __init__(self):
        ...         super().__init__(inner_steps=1)
        ...         self.theta = torch.nn.Parameter(torch.tensor(0.0))
        ...     def inner_parameters(self): return [self.theta]
        ...     def outer_parameters(self): return [self.theta]
        ...     def inner_loss(self, x): return (self.theta - x).square().mean() / 2
        ...     outer_loss = inner_loss
        ...     def configure_inner_optimizer(self): return SGD(lr=1.0)
        >>> module = Mean()
        >>> with module.adapted([torch.tensor([1.0, 3.0])]):
        ...     print(module.theta)
        tensor(2.)
        >>> module.theta.item()
        0.0
        """
        steps = self.inner_steps if steps is None else steps
        integer("adapted(steps=...)", steps, least=0)
        functional = self.functional()
        warn_of_a_bare_batch(batches)
        with self._knowing(functional.levels):
            with torch.inference_mode(False), torch.enable_grad(), functional.session(twice=False):
                episode = Episode(tree_map(outside_inference, list(some(batches))), None)
                problem = replace(functional.problem, inner_steps=steps)
                phi, memory = functional.phi(), self._memory.recall(functional, episode)
                state = run(problem, problem.start(memory, phi), phi, problem.batches(episode)).state
            with functional.swapper.swapped({**state.params, **state.buffers}):
                yield self

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Estimate the hypergradient and return the outer loss with it as its gradient."""
        attachment, memory = self._attached(), self._memory
        if self.trainer.fit_loop._skip_backward:
            return self._evaluated(batch)
        functional, ranks, strategy = attachment.functional, attachment.ranks, attachment.strategy
        key = Key((memory.seed, memory.estimates, 0, ranks.rank))
        call = Call(key, ranks.share, self.global_step)
        episodes: list[Episode] = []

        def estimated() -> Hypergradient:
            episodes.extend(Episode(some(episode.inner), episode.outer) for episode in self.episodes(batch))
            return self._estimate(strategy, functional, episodes, call)

        before = strategy.state_dict() if self.on_nonfinite == "skip" else {}
        try:
            result, value = ranks.estimated(estimated)
        except FloatingPointError as error:
            if self.on_nonfinite == "raise" or tree.first_nonfinite(functional.phi()) is not None:
                raise
            strategy.load_state_dict(before)
            return self._skipped(functional, error)
        functional.recorder.replay(self, batch_size=len(episodes))
        metrics = {**result.metrics, "hypergradient_norm": tree.norm(result.grads)}
        if memory.estimates == 0 and not strategy.carried() and not metrics["hypergradient_norm"]:
            rank_zero_warn(
                "The first hypergradient is exactly zero, so that nothing is learned from it. `audit(module, batch)` "
                "says which strategies see how the outer parameters act; finite differences may be lost in rounding."
            )
        for monitor in self._monitors:
            if memory.estimates % monitor.every_n_steps == 0:
                again = self._repetition(functional, episodes, key)
                metrics |= ranks.together(partial(monitor.compare, strategy, result, again))
        ranks.settle(memory.keep(functional, result.state, len(episodes)) + strategy.carried())
        memory.estimates += 1
        attachment.usable = True
        if not self.trainer.barebones:  # there, logging does nothing but warn
            self.log("outer_loss", value, prog_bar=True, batch_size=len(episodes))
            self.log_dict(metrics, batch_size=len(episodes))
        self._log_skipped()
        return self._surrogate(functional, result.value, result.grads)

    def _evaluated(self, batch: Any) -> Tensor:
        """Return the outer loss, with nothing trained: a pass of Lightning's for the statistics of BatchNorm (SWA)."""
        with torch.no_grad():
            for episode in self.episodes(batch):
                for inner in () if self.has_solver else episode.inner:
                    self.inner_loss(inner)
                value = self.outer_loss(episode.outer)
        return value

    def _skipped(self, functional: FunctionalModule, error: FloatingPointError) -> Tensor:
        """Return a loss without a gradient, and count it; the inner level is as it was before."""
        self._memory.estimates += 1  # the next one draws anew
        self._memory.skipped += 1
        if self._memory.skipped == 1:
            rank_zero_warn(f"Skipped an outer step, and will skip others like it (see `skipped_steps`): {error}")
        self._log_skipped()
        # Lightning refuses ``None`` in more than one process; :meth:`drop_skipped` undoes the zeros.
        phi = functional.phi()
        return self._surrogate(functional, next(iter(phi.values())).new_tensor(float("nan")), tree.zeros_like(phi))

    def _log_skipped(self) -> None:
        if self.on_nonfinite == "skip" and not self.trainer.barebones:
            self.log("skipped_steps", float(self._memory.skipped), prog_bar=True, batch_size=1)

    def drop_skipped(self) -> None:
        """Let the outer optimizer leave its parameters alone if every estimate for this step was skipped.

        A gradient of zeros would still move them: by momentum, or weight decay.
        """
        attachment = self._attached()
        if self.on_nonfinite == "skip" and not attachment.usable:
            for name in attachment.functional.levels.outer:
                self.get_parameter(name).grad = None
        attachment.usable = False

    def _surrogate(self, functional: FunctionalModule, value: Tensor, grads: Params) -> Tensor:
        names = functional.levels.outer
        parameters = [functional.swapper.current(name) for name in names]
        return surrogate_loss(value, [grads[name] for name in names], parameters)

    def functional(self) -> FunctionalModule:
        """Return the pure functions of this module: those of the running fit, or fresh ones."""
        if self._attachment is not None and self._attachment.ready:
            return self._attachment.functional
        refuse(self.missing_hooks())
        return functional_of(self)

    @contextmanager
    def _knowing(self, levels: Levels) -> Iterator[None]:
        """Let the default ``inner_parameters`` or ``outer_parameters`` answer by name.

        What stands in the parameters' places while losses are evaluated has no flags to go by.
        """
        before, self._levels = self._levels, levels
        try:
            yield
        finally:
            self._levels = before

    def attach_strategy(self, strategy: HypergradientStrategy, trainer: Trainer) -> None:
        """Prepare a fit: check the combination, and freeze inner-only parameters before DDP wraps the module.

        Freezing waits until ``setup`` and ``configure_model`` have run, for the module may build its layers there.
        """
        if self._attachment is not None and self._attachment.strategy is not strategy:
            first, second = type(self._attachment.strategy).__name__, type(strategy).__name__
            raise combination_error(
                f"`{first}` and `{second}` in one Trainer",
                "a training step takes one hypergradient",
                "Keep one in `callbacks`, or put both in a `HypergradientSchedule`",
            )
        refuse(fit_refusals(self, BilevelModule.training_step, strategy, trainer))
        warn_of_precision(trainer)
        seed = int(trainer.strategy.broadcast(torch.initial_seed())) % 2**63
        self._attachment = attachment = Attachment(strategy, trainer, seed)
        self._once_after("setup", lambda: self._prepare_after_layers(attachment))
        self._once_after("on_train_start", lambda: prepare_episodes(trainer))

    def _prepare_after_layers(self, attachment: Attachment) -> None:
        # Not shadowed before: other callbacks ask in their own ``setup`` whether the hook is overridden.
        if getattr(self.configure_model, "__func__", None) is LightningModule.configure_model:
            self._prepare(attachment)
        else:
            self._once_after("configure_model", lambda: self._prepare(attachment))

    def _prepare(self, attachment: Attachment) -> None:
        self._levels = attachment.prepare(self, self._memory)

    def _once_after(self, hook: str, action: Callable[[], None]) -> None:
        """Shadow a hook on the instance: at its next call, ``action`` follows and the shadow goes."""
        original = getattr(self, hook)

        def shadow(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            self.__dict__.pop(hook, None)
            action()

        self.__dict__[hook] = shadow

    def attach_monitor(self, monitor: HypergradientMonitor) -> None:
        """Let a monitor see the estimates of this fit."""
        self._monitors.append(monitor)

    def detach_monitors(self) -> None:
        """Undo :meth:`attach_monitor`."""
        self._monitors.clear()

    def detach_strategy(self) -> None:
        """Undo :meth:`attach_strategy`."""
        for hook in ("setup", "configure_model", "on_train_start"):
            self.__dict__.pop(hook, None)
        if self._attachment is not None:
            self._attachment.undo()
            self._attachment = self._levels = None

    def inner_state_dict(self) -> dict[str, Any]:
        """Return what the inner level carries from step to step, for a checkpoint."""
        return self._memory.state_dict()

    def load_inner_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore :meth:`inner_state_dict`; ``None`` begins anew from weights that were loaded after :meth:`setup`."""
        attachment = self._attachment if self._attachment is not None and self._attachment.ready else None
        if state is not None:
            self._memory.load_state_dict(state, self.device, attachment.functional if attachment is not None else None)
        elif attachment is not None:
            self._memory.begin(attachment.functional, attachment.seed)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what the inner level carries, also for an evaluation and in ``load_from_checkpoint``.

        An override has to call this one.
        """
        if (saved := checkpoint.get("lightning_bilevel")) is not None:
            self._memory.load_state_dict(saved, self.device)

    def on_fit_start(self) -> None:
        """Refuse a fit without a strategy, or without an optimizer for φ, before the first batch."""
        functional = self._attached().functional
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        left_out = [name for name in functional.levels.outer if id(self.get_parameter(name)) not in held]
        if groups and len(left_out) == len(functional.levels.outer):
            raise missing_error(
                type(self).__name__,
                "outer parameter in its optimizer",
                "Let `configure_optimizers()` return `torch.optim.Adam(self.outer_parameters())`, say",
            )
        if groups and left_out:
            rank_zero_warn(
                f"No optimizer has the outer parameters {left_out}: they stay as they are. Give "
                "`configure_optimizers()` all of `outer_parameters()`, or select fewer there."
            )

    def _attached(self) -> Attachment:
        if self._attachment is None or not self._attachment.ready:
            raise missing_error(
                type(self).__name__,
                "hypergradient strategy",
                "Add one to the Trainer: `pl.Trainer(callbacks=[ReverseUnroll()])`",
            )
        return self._attachment

    def _estimate(
        self,
        strategy: HypergradientStrategy,
        functional: FunctionalModule,
        episodes: Sequence[Episode],
        call: Call,
        masks: Key | None = None,
    ) -> Hypergradient:
        """Return the mean estimate over episodes; checks the module on the first ones it sees.

        Args:
            strategy: the estimator.
            functional: the pure functions.
            episodes: the episodes.
            call: names the estimate.
            masks: names what the losses draw (dropout); default that of ``call``. The global generators are left as
                they are, so that a resumed fit goes on with the masks of the one that was cut off.
        """
        if not episodes:
            raise value_error(
                f"{type(self).__name__}.episodes(batch)", "at least one episode", [], "Look at the loader."
            )
        phi, several, recorder = functional.phi(), len(episodes) > 1, functional.recorder
        if several and self._memory.start == "warm" and functional.levels.inner_only:
            raise combination_error(
                f"`inner_start='warm'` with {len(episodes)} episodes in a batch",
                f"{functional.levels.inner_only[0]} would continue from several ends at once",
                "Use `inner_start='reset'`, or one episode per batch",
            )

        def memories(first: int, count: int) -> InnerState:
            return self._memory.recall(functional, episodes[0], count, first)

        def recorded(first: int, count: int) -> InnerState:
            memory = memories(first, count)
            recorder.begin()
            return memory

        def ended(part: Hypergradient, count: int) -> None:
            recorder.end(part.value, count)

        twice = strategy.second_order
        with functional.session(twice), RngState(functional.device).fork((masks or call.key).fold_in(-1).seed):
            if functional.episode_chunk_size is None:
                strategy.check(functional.problem)
                self._check_losses(functional, episodes[0], memories(0, 0), strategy)
                functional.episode_chunk_size = 0  # chosen at the first batch of several episodes
            if several and functional.episode_chunk_size == 0:
                size = self.episode_chunk_size or functional.problem.vectorizable
                stacks = functional.problem.solver is None and stackable(episodes[0], episodes[0])
                if size > 1 and stacks and not vectorizes(functional.problem, memories(0, 0), phi, episodes[0]):
                    size = 1
                functional.episode_chunk_size = size
            problem = replace(functional.problem, inner_steps=self.inner_steps)  # which may change during a fit
            size = max(functional.episode_chunk_size, 1)
            return estimate(recorder.watched(problem), strategy, recorded, phi, episodes, call, size, ended)

    def _repetition(
        self, functional: FunctionalModule, episodes: Sequence[Episode], masks: Key
    ) -> Callable[[HypergradientStrategy, int], Hypergradient]:
        """Return a function that estimates once more at the present step: the same masks, directions of its own."""

        def again(strategy: HypergradientStrategy, number: int) -> Hypergradient:
            key = Key((seed_of(self._memory.seed, 0, number, 0, 0), self._memory.estimates, 0, 0))
            call = Call(key, step=self.global_step)
            return self._estimate(copy.deepcopy(strategy), functional, episodes, call, masks)

        return again

    def _check_losses(
        self, functional: FunctionalModule, episode: Episode, memory: InnerState, strategy: HypergradientStrategy
    ) -> None:
        warn_of_a_bare_batch(episode.inner)
        for argument in functional.negative():
            rank_zero_warn(f"`{argument}` is negative as a tensor. Is an `.exp()` missing where it is learned?")
        with RngState(functional.device).fork():
            untouched = functional.untouched(episode, memory)
            # A user's solver takes its own derivatives; what is left is the inner loss of the implicit gradient.
            twice = strategy.second_order and (functional.problem.solver is None or strategy.requires == "inner_loss")
            once = functional.without_second_derivative(episode, memory) if twice else []
        if untouched:
            raise missing_error(
                type(self).__name__,
                f"loss that depends on the outer parameters {untouched}",
                "Use them in `inner_loss`, `outer_loss` or `configure_inner_optimizer`, looked up on `self` at "
                "every call, or do not select them in `outer_parameters()`",
            )
        if once:
            raise combination_error(
                f"`{type(strategy).__name__}` with `{once[0]}` in `{type(self).__name__}.inner_loss`",
                f"`{once[0]}` is marked `once_differentiable`, so that autograd would leave its second derivative out "
                "without a word",
                "Write its `backward` with differentiable operations and drop the mark, or use `PZOBO`",
            )


def hypergradient(
    module: BilevelModule, strategy: HypergradientStrategy, episode: Episode | Sequence[Episode], *, seed: int = 0
) -> Hypergradient:
    """Return one hypergradient estimate, without a Trainer; nothing in the module changes.

    Args:
        module: the problem.
        strategy: the estimator.
        episode: one episode, or several for the mean of their estimates.
        seed: of random directions, and of dropout. Directions also go by the training steps taken, so that the
            same seed repeats an estimate of a fit while the fit stands there.

    >>> from lightning_bilevel import SGD, ReverseUnroll
    >>> class Scale(BilevelModule):
    ...     def __init__(self):
    ...         super().__init__(inner_steps=1, inner_start="reset")
    ...         self.theta, self.phi = (torch.nn.Parameter(torch.tensor(value)) for value in (0.0, 1.0))
    ...     def outer_parameters(self): return [self.phi]
    ...     def inner_loss(self, x): return (self.theta - self.phi * x).square() / 2
    ...     def outer_loss(self, x): return (self.theta - x).square() / 2
    ...     def configure_inner_optimizer(self): return SGD(lr=0.5)
    >>> x = torch.tensor(2.0)
    >>> hypergradient(Scale(), ReverseUnroll(), Episode([x], x)).grads
    {'phi': tensor(-1.)}
    """
    if not isinstance(strategy, HypergradientStrategy):
        raise value_error("hypergradient(strategy=...)", "a strategy such as `ReverseUnroll()`", strategy)
    given: Sequence[Any] = [episode] if isinstance(episode, Episode) else list(episode)
    if not all(isinstance(each, Episode) for each in given):
        given = module.episodes(episode)
    with torch.inference_mode(False), torch.enable_grad():
        functional = module.functional()
        episodes = [Episode(*tree_map(outside_inference, (some(each.inner), each.outer))) for each in given]
        with module._knowing(functional.levels):
            return module._estimate(
                copy.deepcopy(strategy), functional, episodes, Call(Key((seed, module._memory.estimates, 0, 0)))
            )
