"""``bilevel``: an existing LightningModule, as it is, with an inner and an outer level."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bilevel.errors import combination_error, missing_error, no_loss_error, value_error
from lightning_bilevel.host import LightningModule, is_foreign, is_param_in_hook_signature, mixing, rank_zero_warn
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.modules.hooks import InnerStart, OnNonfinite
from lightning_bilevel.modules.levels import abbreviate
from lightning_bilevel.problem import Batch
from lightning_bilevel.training.module import BilevelModule
from lightning_bilevel.training.outer_optimizer import (
    OuterOptimizerLike,
    checked_outer_optimizer,
    chosen_outer_optimizer,
)
from lightning_bilevel.training.selection import (
    Names,
    as_patterns,
    beside_layers,
    defines,
    made_later,
    matching,
    require_trained,
)
from lightning_bilevel.training.uncompiled import uncompiled

Loss = str | Callable[[Any, Batch], Any] | None
InnerOptimizerLike = InnerOptimizer | torch.optim.Optimizer | Callable[[Any], InnerOptimizer | torch.optim.Optimizer]

_STEPS = ("validation_step", "test_step", "predict_step", "forward", "log", "log_dict")
_OPTIMIZATION = ("backward", "lr_scheduler_step", "optimizer_step", "optimizer_zero_grad")
_DATA = ("prepare_data", "train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
_SETUP = ("setup", "transfer_batch_to_device")


def bilevel(
    module: LightningModule,
    *,
    inner: Names | Iterable[Names],
    outer: Names | Iterable[Names],
    inner_loss: Loss = None,
    outer_loss: Loss = None,
    inner_optimizer: InnerOptimizerLike,
    outer_optimizer: OuterOptimizerLike = None,
    inner_steps: int = 1,
    inner_start: InnerStart = "warm",
    proximal: float = 0.0,
    episode_chunk_size: int | None = None,
    on_nonfinite: OnNonfinite = "raise",
    allow_unused: bool = False,
    compile: bool = False,  # noqa: A002
) -> BilevelModule:
    """Make an existing LightningModule bilevel, without a change to its code.

    What comes back is a :class:`BilevelModule` that holds ``module`` as its child ``module``, for
    ``trainer.fit(wrapped, EpisodeLoader(...))`` with a hypergradient strategy among the callbacks. Every hook that the
    module defines (validation, test and prediction steps, ``forward``, ``on_...``, dataloaders, callbacks) is called as
    in a fit of its own, except that the training hooks get an :class:`Episode` for a batch; batch transfer hooks get
    each batch of it. What its losses log is logged once per training step, under the same names; of a name that both
    losses log, the outer loss's value. What the outer loss returns beside ``"loss"`` reaches
    ``on_train_batch_end(outputs, ...)``, as :meth:`BilevelModule.outer_loss` says; a loss of ``None`` skips the step.

    ``module`` is trained in place: after the fit, the object itself has the new parameters, and is tied neither to the
    wrapper nor to the Trainer. A checkpoint of the fit has its ``state_dict`` and ``hparams`` as one of its own would,
    so that ``type(module).load_from_checkpoint(path)`` opens it. (The wrapper's ``named_parameters``, and so the names
    in a :class:`Hypergradient`, have the prefix ``module.``.)

    Args:
        module: any LightningModule. One that optimizes manually needs both losses, for its ``training_step`` is not
            called then; Lightning steps its optimizer and its learning-rate schedule.
        inner: selects θ: a submodule's name (all its parameters), a parameter's name, a pattern of parameter names
            such as ``"*.bias"``, a submodule, a parameter, or a list of these. Frozen parameters do not count. Names
            are looked up again in the fit, so that they may be of layers that ``setup`` or ``configure_model`` makes.
        outer: selects φ, in the same ways. Parameters in both levels are a learned initialization: θ starts at φ.
        inner_loss: g: a function of the module and a batch, or a method of the module that takes a batch, or its name.
            Default: the loss that ``module.training_step(batch, batch_idx)`` returns.
        outer_loss: f, likewise. Where θ is trained with a penalty or weights that φ sets, give a loss without them: in
            the training step's own, φ makes as little of them as it can. A warning says so where φ has parameters that
            are no part of a layer; ``"training_step"`` says that the step is meant.
        inner_optimizer: an :class:`InnerOptimizer`; a function of the module that returns one, which may depend on
            outer parameters and is called at every inner step; or a ``torch.optim`` class, ``functools.partial`` of
            one, or a function with one argument named ``params`` that returns a ``torch.optim`` instance.
        outer_optimizer: a ``torch.optim`` class, ``functools.partial`` of one, or a function of the outer parameters
            (of the module, where its argument is named ``module``) that returns an optimizer, or one with its
            schedules as ``configure_optimizers`` may; also such an instance on the outer parameters. Default: what the
            module's ``configure_optimizers`` returns; of several optimizers the one with outer parameters.
        inner_steps: T, the number of inner steps.
        inner_start: where inner parameters that are not shared start, as in :class:`BilevelModule`.
        proximal: as in :class:`BilevelModule`.
        episode_chunk_size: as in :class:`BilevelModule`.
        on_nonfinite: as in :class:`BilevelModule`.
        allow_unused: as in :class:`BilevelModule`.
        compile: as in :class:`BilevelModule`.

    Returns:
        The wrapper. Its losses are 0-dim tensors; its parameters are those of ``module``.

    Raises:
        ValueError: an argument of the wrong kind, or a selection that matches nothing.
        MisconfigurationError: a ``training_step`` that optimizes manually as a loss, a module that is bilevel already,
            no ``training_step`` where one is needed; at fit, no optimizer with outer parameters, or several.

    >>> from lightning_bilevel import SGD, Episode, ReverseUnroll, hypergradient
    >>> class Ridge(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = nn.Linear(2, 1, bias=False)
    ...         self.log_penalty = nn.Parameter(torch.tensor(0.0))
    ...         nn.init.zeros_(self.net.weight)
    ...     def training_step(self, batch, batch_idx):
    ...         fit = (self.net(batch[0]) - batch[1]).square().mean()
    ...         return fit + self.log_penalty.exp() * self.net.weight.square().sum()
    >>> def validation_loss(module, batch):
    ...     return (module.net(batch[0]) - batch[1]).square().mean()
    >>> wrapped = bilevel(
    ...     Ridge(), inner="net", outer="log_penalty", outer_loss=validation_loss, inner_optimizer=SGD(lr=0.1),
    ...     inner_steps=3, inner_start="reset",
    ... )
    >>> batch = torch.eye(2), torch.ones(2, 1)
    >>> estimate = hypergradient(wrapped, ReverseUnroll(), Episode([batch], batch))
    >>> round(estimate.grads["module.log_penalty"].item(), 4)
    0.075
    """
    module = uncompiled(module)
    if is_foreign(module):
        raise combination_error(*mixing(f"`bilevel` with `{type(module).__name__}`"))
    if not isinstance(module, LightningModule):
        raise value_error("bilevel(module)", f"a `{_full_name(LightningModule)}`", _full_name(type(module)))
    owner = type(module).__name__
    if isinstance(module, BilevelModule):
        raise combination_error(
            f"`bilevel` with `{owner}`", "it is a `BilevelModule` already", "Pass it to `trainer.fit` as it is"
        )
    losses = {
        "inner_loss": _checked_loss(module, "inner_loss", inner_loss),
        "outer_loss": _checked_loss(module, "outer_loss", outer_loss),
    }
    if not module.automatic_optimization and any(loss in (None, "training_step") for loss in losses.values()):
        raise combination_error(
            f"`bilevel` with `{owner}`, which optimizes manually",
            "its `training_step` steps the optimizers itself, and is no loss",
            "Pass both `inner_loss` and `outer_loss`",
        )
    hooks = tuple(name for name in _delegated() if defines(module, name))
    kind: Any = type(module)
    wrapper = _class_for(kind, hooks)(
        module,
        {"inner": as_patterns(module, "inner", inner), "outer": as_patterns(module, "outer", outer)},
        losses,
        _checked_optimizer(inner_optimizer),
        checked_outer_optimizer(outer_optimizer),
        inner_steps=inner_steps,
        inner_start=inner_start,
        proximal=proximal,
        episode_chunk_size=episode_chunk_size,
        on_nonfinite=on_nonfinite,
        allow_unused=allow_unused,
        compile=compile,
    )
    if not made_later(module):
        wrapper.inner_parameters(), wrapper.outer_parameters()  # which raise
        wrapper.question_judge()
    return wrapper


class WrappedModule(BilevelModule):
    """What :func:`bilevel` returns; subclasses made by it have the hooks that the module defines.

    Args:
        module: the original.
        patterns: of each level.
        losses: by hook name.
        inner_optimizer: as in :func:`bilevel`.
        outer_optimizer: as in :func:`bilevel`.
        options: of :class:`BilevelModule`.
    """

    module: LightningModule
    _ALL_OF_THEM = "Pass `bilevel(outer_optimizer=...)`, which gets all, or select fewer in `bilevel(outer=...)`."

    def __init__(
        self,
        module: LightningModule,
        patterns: Mapping[str, Sequence[str]],
        losses: Mapping[str, Loss],
        inner_optimizer: InnerOptimizerLike,
        outer_optimizer: OuterOptimizerLike = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.module = module
        self._patterns, self._losses = patterns, losses
        # In a list, for an inner optimizer may be a module, whose parameters are the module's already.
        self._inner_optimizer = [inner_optimizer]
        self._outer_optimizer = outer_optimizer
        self.example_input_array = module.example_input_array
        self.strict_loading = module.strict_loading
        self._log_hyperparams = module._log_hyperparams
        if hasattr(module, "_hparams_name"):
            self._hparams_name = module._hparams_name

    @property
    def hparams(self) -> Any:
        """The module's hyperparameters, for loggers and checkpoints."""
        return self.module.hparams

    @property
    def hparams_initial(self) -> Any:
        """The module's hyperparameters as they were first saved."""
        return self.module.hparams_initial

    def inner_parameters(self) -> list[nn.Parameter]:
        """Return what ``inner`` selects."""
        return self._selected("inner")

    def outer_parameters(self) -> list[nn.Parameter]:
        """Return what ``outer`` selects."""
        return self._selected("outer")

    def inner_loss(self, batch: Batch) -> Any:
        """Evaluate the inner loss of the module."""
        return self._loss("inner_loss", batch)

    def outer_loss(self, batch: Batch) -> Any:
        """Evaluate the outer loss of the module."""
        return self._loss("outer_loss", batch)

    def configure_inner_optimizer(self) -> InnerOptimizer | torch.optim.Optimizer:
        """Return the inner optimizer, with the outer parameters of now."""
        optimizer = self._inner_optimizer[0]
        if isinstance(optimizer, (InnerOptimizer, torch.optim.Optimizer)):
            return optimizer
        with self.current_hook():
            return optimizer(self.inner_parameters() if _takes_parameters(optimizer) else self.module)

    def configure_optimizers(self) -> Any:
        """Return the outer optimizer that was given, or the module's own."""
        outer = [parameter for parameter in self.outer_parameters() if parameter.requires_grad]
        with self.current_hook():
            return chosen_outer_optimizer(self.module, self._outer_optimizer, outer)

    def question_judge(self) -> None:
        """Warn where the training step judges outer parameters that it may train θ with a penalty by."""
        if any(self._losses.values()):
            return
        inner = {id(parameter) for parameter in self.inner_parameters()}
        own = [parameter for parameter in self.outer_parameters() if id(parameter) not in inner]
        if names := beside_layers(self.module, own):
            rank_zero_warn(
                f"`bilevel` got no `outer_loss`, so that the `training_step` of `{type(self.module).__name__}`, with "
                f"whatever penalty or weight is in it, also judges {abbreviate(names)}: of those they make as little "
                "as they can. Name the loss that judges, `bilevel(outer_loss=...)`: a function of the module and a "
                "batch, or a method that returns one. `outer_loss='training_step'` says that the step is meant."
            )

    def on_fit_start(self) -> None:
        """Look at the optimizer before the first batch, and do what the module does."""
        super().on_fit_start()
        if made_later(self.module):
            self.question_judge()
        with self.current_hook():
            self.module.on_fit_start()

    def teardown(self, stage: str) -> None:
        """Do what the module does, and leave it without a Trainer."""
        with self.current_hook():
            self.module.teardown(stage)
        self._let_go()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what the inner level carries, and what the module does."""
        super().on_load_checkpoint(checkpoint)
        with self.current_hook():
            self.module.on_load_checkpoint(checkpoint)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's, so that its own class opens a checkpoint of the fit."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load the module's, or one with the prefix ``module.``, as earlier versions wrote it."""
        return self.module.load_state_dict(self._of_module(state_dict), *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # What holds this wrapper as its child (a running average) loads it here, and its children by their names next.
        given = {name.removeprefix(prefix): state_dict.pop(name) for name in [*state_dict] if name.startswith(prefix)}
        state_dict.update({f"{prefix}module.{name}": value for name, value in self._of_module(given).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _of_module(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        if not all(name.startswith("module.") for name in state_dict):
            return state_dict
        if self.module.state_dict().keys() & state_dict.keys():  # it has a child of that name
            return state_dict
        return {name.removeprefix("module."): value for name, value in state_dict.items()}

    @contextmanager
    def current_hook(self) -> Iterator[None]:
        """Let the module know the Trainer, and which of its hooks it is in, for ``log``."""
        module = self.module
        name, trainer = module._current_fx_name, module._trainer
        attach = self._trainer is not None and self._trainer is not trainer  # as it was, before a fit and after it
        if attach:
            module.trainer = self._trainer
        module._current_fx_name = self._current_fx_name
        try:
            yield
        finally:
            module._current_fx_name = name
            if attach:
                module.trainer = trainer

    def _selected(self, level: str) -> list[nn.Parameter]:
        chosen = matching(self.module, level, self._patterns[level])
        if self._levels is None:  # in a fit, inner parameters are frozen
            require_trained(self.module, level, chosen)
        return chosen

    def _let_go(self) -> None:
        self.module.trainer = None
        self.module._metric_attributes = None  # as Lightning does: ``setup`` may make others next time

    def _loss(self, hook: str, batch: Batch) -> Any:
        chosen, owner = self._losses[hook], type(self.module).__name__
        result: Any
        with self.current_hook():
            if callable(chosen):
                what, result = f"{hook}(module, batch)", chosen(self.module, batch)
            else:
                name = chosen or "training_step"
                method = getattr(self.module, name)
                arguments, step = [batch], name in ("training_step", "validation_step", "test_step")
                # Lightning passes it to a step by position; another method has to ask for it by name.
                if is_param_in_hook_signature(method, "batch_idx", explicit=not step, min_args=2 if step else None):
                    arguments.append(max(self.trainer.fit_loop.batch_idx, 0) if self._trainer else 0)
                what, result = f"{owner}.{name}(batch)", method(*arguments)
        if result is None:
            hint = f"Let it return the loss, or name another that does: `bilevel({hook}=lambda module, batch: ...)`."
            raise no_loss_error(what, hint)
        value = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(value, Tensor):
            got = type(result).__name__
            raise value_error(what, "a loss tensor, or a mapping with one at 'loss'", got, f"It is the `{hook}`.")
        return result

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a checkpoint has neither the module's class nor its levels."""
        raise combination_error(
            "`load_from_checkpoint` of what `bilevel` returned",
            "a checkpoint has no levels, losses and inner optimizer",
            "Use that of the module's own class, or "
            "`bilevel(module, ...).load_state_dict(torch.load(path)['state_dict'])`",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the class, which no name leads to, as what it was made from."""
        return _blank, (type(self.module), type(self)._hooks), self.__getstate__()

    _hooks: tuple[str, ...] = ()


@functools.cache
def _class_for(kind: Any, hooks: tuple[str, ...]) -> type[WrappedModule]:
    """Return the subclass with the given hooks: Lightning asks of many whether they are overridden."""
    methods = {name: _delegate(name, getattr(kind, name)) for name in hooks}
    return type(
        f"Bilevel{kind.__name__}", (WrappedModule,), {**methods, "_hooks": hooks, "__module__": kind.__module__}
    )


def _blank(kind: Any, hooks: tuple[str, ...]) -> WrappedModule:
    made = _class_for(kind, hooks)
    return made.__new__(made)


def _delegate(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that calls the module's; it has its signature, which Lightning reads too."""

    @functools.wraps(original)
    def method(self: WrappedModule, *args: Any, **kwargs: Any) -> Any:
        function = getattr(self.module, name)
        with self.current_hook():
            return function(*args, **kwargs)

    return method


def _delegated() -> list[str]:
    """Return the names of the hooks that are the module's own business."""
    prefixed = [
        name
        for name in dir(LightningModule)
        if name.startswith(("on_", "configure_")) and inspect.isfunction(getattr(LightningModule, name))
    ]
    taken = {"on_fit_start", "on_load_checkpoint", "configure_optimizers"}
    named = [*_STEPS, *_OPTIMIZATION, *_DATA, *_SETUP]
    return [name for name in dict.fromkeys([*prefixed, *named]) if name not in taken]


def _checked_loss(module: LightningModule, hook: str, loss: Any) -> Loss:
    owner = type(module).__name__
    if loss is None and not defines(module, "training_step"):
        raise missing_error(owner, "`training_step`", f"Pass `bilevel({hook}=...)`")
    if getattr(loss, "__self__", None) is module:
        loss = loss.__name__  # by which a copy of the module finds its own
    if loss is None or (isinstance(loss, str) and callable(getattr(module, loss, None))):
        return loss
    if isinstance(loss, str) or not callable(loss):
        raise value_error(
            f"bilevel({hook}=...)", f"a function of the module and a batch, or the name of a method of `{owner}`", loss
        )
    return loss


def _checked_optimizer(optimizer: Any) -> InnerOptimizerLike:
    if not isinstance(optimizer, (InnerOptimizer, torch.optim.Optimizer)) and (
        not callable(optimizer) or (isinstance(optimizer, type) and issubclass(optimizer, InnerOptimizer))
    ):
        raise value_error(
            "bilevel(inner_optimizer=...)",
            "an `InnerOptimizer`, a function of the module that returns one, or a partial of a `torch.optim` class",
            optimizer,
            "Write `SGD(lr=0.1)`, with `from lightning_bilevel import SGD`.",
        )
    return optimizer


def _takes_parameters(function: Any) -> bool:
    made = function.func if isinstance(function, functools.partial) else function
    if isinstance(made, type) and issubclass(made, torch.optim.Optimizer):
        return True
    return next(iter(inspect.signature(function).parameters), "") == "params"


def _full_name(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"
