"""``BilevelModule``: a LightningModule whose training step is one hypergradient estimate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch

from lightning_bilevel.calculus.runs import run
from lightning_bilevel.data.batch_hooks import each_batch, holds_episodes, settled
from lightning_bilevel.data.inputs import check_episodes, check_inner_batches, warn_of_parts
from lightning_bilevel.errors import flag, integer, missing_error, number, one_of
from lightning_bilevel.host import is_overridden, notice_other_namespace, rank_zero_warn
from lightning_bilevel.modules.examine import examination_of
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.modules.hooks import BilevelHooks, InnerStart, OnNonfinite
from lightning_bilevel.problem import Batch, Episode
from lightning_bilevel.training.attachment import attached
from lightning_bilevel.training.estimating import PARTS
from lightning_bilevel.training.fit import FitContext, refuse_repeated_closures
from lightning_bilevel.training.modes import Mode, in_mode
from lightning_bilevel.training.uncompiled import uncompiled


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
            optimizer's state; ``"reset"`` returns to the values at the start of the fit; ``"reinit"`` draws fresh ones;
            ``"rollback"`` continues, but the steps that the hypergradient is taken through are virtual: after the outer
            optimizer's step, they are taken again from where they began, with the new φ (DARTS, Meta-Weight-Net).
        proximal: λ of the term λ/2 ‖θ − φ‖² added to the inner loss for shared parameters (iMAML).
        episode_chunk_size: episodes of one batch that are vectorized together; ``None`` chooses by device and
            kind of net, 1 loops.
        on_nonfinite: what a nan or an infinity in an estimate does: ``"raise"`` stops with an error that says where it
            came up; ``"skip"`` leaves θ, φ and the outer optimizer's state as they were, and goes on with the next
            episode; ``skipped_steps`` is logged.
        allow_unused: say nothing of outer parameters that no loss reads. By default :func:`hypergradient` refuses them,
            and a fit warns of those that no episode of its first epoch has reached.
        compile: take the inner steps, forward and backward, and evaluate the losses by compiled graphs. What they
            compute is the same up to rounding; what cannot be compiled is not, with a warning that says why. The first
            steps take seconds.

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

    _ALL_OF_THEM = "Give `configure_optimizers()` all of `outer_parameters()`, or select fewer there."

    def __init__(
        self,
        inner_steps: int = 1,
        inner_start: InnerStart = "warm",
        proximal: float = 0.0,
        episode_chunk_size: int | None = None,
        on_nonfinite: OnNonfinite = "raise",
        allow_unused: bool = False,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__()
        notice_other_namespace()
        self.inner_steps = integer("BilevelModule(inner_steps=...)", inner_steps)
        self.inner_start = one_of("BilevelModule(inner_start=...)", InnerStart, inner_start)
        self.proximal = number("BilevelModule(proximal=...)", proximal, at_least=0)
        if episode_chunk_size is not None:
            integer("BilevelModule(episode_chunk_size=...)", episode_chunk_size)
        self.episode_chunk_size = episode_chunk_size
        self.on_nonfinite = one_of("BilevelModule(on_nonfinite=...)", OnNonfinite, on_nonfinite)
        self.allow_unused = allow_unused
        self.compiles_steps = flag("BilevelModule(compile=...)", compile)
        self._levels = None  # here, so that a fit adds no attribute
        self.fit_context = FitContext(self, BilevelModule.training_step)

    @contextmanager
    def adapted(
        self, batches: Sequence[Batch], steps: int | None = None, *, mode: Mode = "train"
    ) -> Iterator[BilevelModule]:
        """Compute with θ adapted on ``batches`` inside the block; for validation, test and prediction.

        Works under Lightning's inference mode. The module itself is unchanged.

        The inner steps are taken in training mode, as in a fit: by the statistics of their batches, with dropout. The
        block itself runs in the mode that the module is in, which Lightning's validation makes evaluation: with the
        running statistics as the inner steps have left them, without dropout. (MAML of a small convolutional net with
        batch norm, five digits with one example each: 87% of the queries are right. With inner steps in evaluation
        mode, 20% are, which is chance; with the block in training mode as well, by the statistics of the queries, 89%,
        and 80% where there is dropout.)

        Args:
            batches: inner batches, as in ``Episode.inner``: a list of them, or one that is no list or tuple.
            steps: inner steps; default ``inner_steps``; 0 is θ_0.
            mode: of the inner steps. ``"train"``: as in the last step of a fit, where parts of the module may be in
                evaluation mode; without one, all of it in training mode. ``"eval"``: evaluation mode. ``None``: the
                mode that the module is in. Where steps meet running statistics in evaluation mode, a warning says so.

        Raises:
            ValueError: no inner batch, or a bad ``steps`` or ``mode``.
            MisconfigurationError: a hook reads ``self.trainer``, and there is none.

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
        if mode is not None:
            one_of("adapted(mode=...)", Literal["train", "eval"], mode)
        with attached(self, "adapted"):
            functional, memory = self.functional(), self.fit_context.memory
        with functional.knowing_levels():
            with (
                attached(self, "adapted"),
                torch.inference_mode(False),
                torch.enable_grad(),
                in_mode(self, mode, memory.modes) as changed,
                functional.session(twice=False) as before,
                before.fork() if changed else nullcontext(),  # what the block draws is what it draws without
            ):
                episode = Episode(check_inner_batches(batches), None)
                warn_of_parts(episode.inner, functional.findings.get(PARTS, 0), "an inner batch of the last estimate")
                buffers = examination_of(functional, memory.values(functional), episode).buffers
                problem = replace(functional.problem.judged_at_the_end().on(episode), inner_steps=steps)
                phi = functional.phi()
                start = problem.start(memory.recall(functional, buffers)[0], phi)
                state = run(problem, start, phi, problem.batches(episode)).state
            with functional.swapper.swapped({**state.params, **state.buffers}):
                yield self

    def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
        """Estimate the hypergradient and return the outer loss with it as its gradient, and what is beside the loss."""
        fit = self.fit_context.fit
        if self.trainer.fit_loop._skip_backward:
            return self._evaluated(batch)
        return fit.output(fit.estimate(batch))

    def functional(self) -> FunctionalModule:
        """Return the pure functions of this module: those of the running fit, or fresh ones."""
        return self.fit_context.functional()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what goes on from step to step, also for an evaluation and in ``load_from_checkpoint``.

        An override has to call this one.
        """
        if (saved := checkpoint.get("lightning_bilevel")) is not None:
            self.fit_context.memory.load_state_dict(saved, self.device)

    def on_fit_start(self) -> None:
        """Refuse a fit without a strategy, or without an optimizer for φ, before the first batch."""
        functional = self.fit_context.fit.functional
        refuse_repeated_closures(self.trainer, functional)
        outer = functional.levels.outer
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        left_out = [name for name in outer if id(self.get_parameter(name)) not in held]
        if groups and len(left_out) == len(outer):
            raise missing_error(
                type(self).__name__,
                "outer parameter in its optimizer",
                "Let `configure_optimizers()` return `torch.optim.Adam(self.outer_parameters())`, say",
            )
        if groups and left_out:
            rank_zero_warn(
                f"No optimizer has the outer parameters {left_out}: they stay as they are. {self._ALL_OF_THEM}"
            )

    def _call_batch_hook(self, hook_name: str, *args: Any) -> Any:
        """Call a batch hook, of this module or of a data module in its place, with each batch of an episode.

        Lightning calls this for all three hooks, in every stage. What nobody overrides takes the episode at once.
        """
        if self._compiler_ctx is not None:
            uncompiled(self)  # in every stage, before its step
        call = super()._call_batch_hook
        batch, *others = args
        data = self._trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
        if not holds_episodes(batch):
            return call(hook_name, *args)
        if not (is_overridden(hook_name, self) or is_overridden(hook_name, data)):
            if hook_name == "transfer_batch_to_device" and (here := settled(batch, others[0])) is not None:
                call(hook_name, [], *others)  # for who counts the calls of hooks: profilers
                return here
            return call(hook_name, *args)
        return each_batch(batch, lambda one: call(hook_name, one, *others))

    def _evaluated(self, batch: Any) -> Any:
        """Return the outer loss, with nothing trained: a pass of Lightning's for the statistics of BatchNorm (SWA)."""
        with torch.no_grad():
            for episode in check_episodes(self.episodes(batch), type(self).__name__):
                for inner in () if self.has_solver else episode.inner:
                    self.inner_loss(inner)
                value = self.outer_loss(episode.outer)
        return value
