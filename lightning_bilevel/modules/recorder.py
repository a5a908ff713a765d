"""``self.log`` and metrics inside losses: kept aside while derivatives are taken, logged once afterwards."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from lightning_bilevel.host import LightningModule, rank_zero_info, rank_zero_warn
from lightning_bilevel.modules.attributes import Attributes, Snapshot, once, plain, written_in_place
from lightning_bilevel.modules.metrics import Instead, Later, RecordedMetrics, State, unwrapped, usable
from lightning_bilevel.modules.outputs import beside_loss, by_episode
from lightning_bilevel.modules.parts import parts
from lightning_bilevel.tree import Params

_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class LogRecorder:
    """Shadows ``log`` and ``log_dict`` of one module, and replays each name once.

    A loss runs many times per training step: at every inner step, again where a strategy recomputes or perturbs, and
    inside function transforms, where Lightning's own ``log`` raises. Replayed is what had been logged when the outer
    loss was evaluated that the estimate reports, at θ_T. A run lasts from :meth:`begin` to :meth:`end`; what is logged
    outside of runs is dropped. Metrics that a loss updates count likewise, once per run, if they are replayed.

    Attributes:
        outer_losses: how many have been evaluated: what they write, later inner losses may read.
        outputs: of each episode, what that outer loss returned beside its value.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[int, dict[str, _Call]]] = []
        self._running = False
        self._loggers: list[LightningModule] = []
        self._latest: dict[str, _Call] = {}
        self._metrics: RecordedMetrics | None = None
        self._attributes: Attributes | None = None
        self._start: Snapshot = []
        self._before: Snapshot = []
        self._final: Snapshot | None = None
        self._buffers: Params = {}
        self._beside: dict[str, Any] = {}
        self._warned = False
        self._in_outer_loss = False
        self._levels: dict[str, set[bool]] = {}  # of each name: whether an outer loss logged it
        self._said: set[str] = set()
        self.outer_losses = 0
        self.outputs: list[dict[str, Any]] = []

    @contextmanager
    def recording(self, module: LightningModule) -> Iterator[None]:
        """Shadow the methods on the instance; remove the shadows on exit. What was kept before is forgotten.

        A LightningModule that is a child logs through the same Trainer, so its methods are shadowed too.
        """
        self.forget()
        if self._attributes is None:
            self._attributes = Attributes(module)
        attributes = self._attributes
        attributes.look()
        self._start = attributes.take()
        self._loggers = loggers = [part for part in parts(module) if isinstance(part, LightningModule)]
        shadowed: list[dict[str, Any]] = [
            {name: child.__dict__[name] for name in ("log", "log_dict") if name in child.__dict__} for child in loggers
        ]
        for child in loggers:
            child.__dict__.update(log=self.log, log_dict=self.log_dict)
        self._metrics = RecordedMetrics(module)
        try:
            with self._metrics.recording():
                yield
        finally:
            for child, before in zip(loggers, shadowed, strict=True):
                del child.__dict__["log"], child.__dict__["log_dict"]
                child.__dict__.update(before)
            self._loggers = []
            attributes.put(self._start)
            attributes.take()  # which lets go of what the losses have written
            self._warn_of(written_in_place(self._start))

    def forget(self) -> None:
        """Drop what was kept of runs."""
        self._runs, self._running, self._final, self.outputs = [], False, None, []

    def begin(self) -> None:
        """Begin a run."""
        self._running, self._latest, self._buffers, self._beside = True, {}, {}, {}
        self._in_outer_loss = False
        if self._metrics:
            self._metrics.begin()

    def evaluation(self, counts: bool = True) -> AbstractContextManager[None]:
        """Evaluate a loss within this context; see :meth:`RecordedMetrics.evaluation`."""
        return self._metrics.evaluation(counts) if self._metrics else nullcontext()

    @contextmanager
    def apart(self, log: Callable[..., None], instead: Instead | None = None) -> Iterator[None]:
        """Evaluate losses inside that leave nothing: their logs go to another function, their metrics do not count.

        Args:
            log: the function.
            instead: of a metric and the name of a method, what is called in its place; ``None``: the metrics are.
        """
        before = self._before, self._buffers, self._beside, self._in_outer_loss, self.outer_losses
        latest = None if self._metrics is None else self._metrics.latest

        def log_dict(dictionary: Mapping[str, Any] | Later, *args: Any, **kwargs: Any) -> None:
            if isinstance(dictionary, Later):
                log(dictionary, dictionary, *args, **kwargs)
            else:
                for name, value in dictionary.items():
                    log(name, value, *args, **kwargs)

        for child in self._loggers:
            child.__dict__.update(log=log, log_dict=log_dict)
        try:
            with self._metrics.replaced(instead) if self._metrics and instead is not None else nullcontext():
                yield
        finally:
            for child in self._loggers:
                child.__dict__.update(log=self.log, log_dict=self.log_dict)
            self._before, self._buffers, self._beside, self._in_outer_loss, self.outer_losses = before
            if self._metrics is not None and latest is not None:
                self._metrics.latest = latest

    @property
    def metrics(self) -> tuple[int, ...]:
        """Which metrics the losses have."""
        return self._metrics.which if self._metrics else ()

    @property
    def counted(self) -> State:
        """What the metrics have counted in this run so far."""
        return self._metrics.latest if self._metrics else {}

    @property
    def evaluation_number(self) -> int | None:
        """The number of the evaluation of a loss that runs; ``None`` where that runs a part of it again."""
        return self._metrics.evaluation_number if self._metrics else 0

    @property
    def in_outer_loss(self) -> bool:
        """Whether an outer loss is evaluated."""
        return self._in_outer_loss

    def before_outer_loss(self, writes: bool = True) -> None:
        """Note the attributes that an outer loss starts from.

        Args:
            writes: whether it may write what an inner loss reads.
        """
        self._in_outer_loss = True
        self.outer_losses += writes
        if self._running and self._attributes is not None:
            self._before = self._attributes.take()

    def after_outer_loss(self, buffers: Params, result: Any) -> None:
        """Note the buffers that an outer loss has left, and what it returned."""
        self._in_outer_loss = False
        self._buffers, self._beside = buffers, beside_loss(result)

    def left(self) -> tuple[Params, dict[str, Any]]:
        """Return the buffers that the last outer loss has left, and what it returned beside its value."""
        return {name: plain(value) for name, value in self._buffers.items()}, self._beside

    def observe(self) -> Observed | None:
        """Return what has been left behind in this run."""
        if not self._running or self._attributes is None or self._metrics is None:
            return None
        taken = self._attributes.take()
        return Observed(dict(self._latest), self._metrics.latest, self._buffers, self._before, taken, self._beside)

    def end(self, observed: Any, count: int) -> Params:
        """End the run of ``count`` episodes; what stood at ``observed`` counts.

        Returns:
            The buffers that the outer loss left, stacked where there are several episodes.
        """
        self._running, self._latest, self._before, self._buffers = False, {}, [], {}
        if not isinstance(observed, Observed):
            return {}
        self._runs.append((count, observed.calls))
        if self._metrics:
            self._metrics.end(observed.metrics)
        self.outputs += by_episode(observed.beside, count)
        self._beside = {}
        self._final = once(self._start, observed.before, observed.after)
        return {name: plain(value) for name, value in observed.buffers.items()}

    def _warn_of(self, names: list[str]) -> None:
        """Warn once of plain tensors that are written to in place, which nothing puts back."""
        if names and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"The losses write to `{'`, `'.join(names)}` in place, a plain tensor: that sees every evaluation, "
                "repeated and perturbed ones, too. Make it a buffer, `self.register_buffer(name, tensor)`: buffers go "
                "along with the inner run."
            )

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the value for later."""
        if self._running:
            self._latest[name] = (primal(value), args, kwargs)
            self._levels.setdefault(name, set()).add(self._in_outer_loss)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Keep the values for later."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def replay(self, module: LightningModule, batch_size: int) -> set[str]:
        """Log each name once, with its mean over the episodes; let the metrics count.

        Args:
            module: the module.
            batch_size: weight of this step in an epoch's mean, unless the call that was kept says otherwise.

        Returns:
            The names.
        """
        if self._metrics:
            self._metrics.replay()
        if self._final is not None and self._attributes is not None:
            self._attributes.put(self._final)
        for name in dict.fromkeys(name for _, calls in self._runs for name in calls):
            calls = [(count, calls[name]) for count, calls in self._runs if name in calls]
            _, (value, args, kwargs) = calls[-1]
            if len(calls) > 1 and isinstance(value, (Tensor, numbers.Number)):
                value = sum(count * call[0] for count, call in calls) / sum(count for count, _ in calls)
            module.log(name, value, *args, **{"batch_size": batch_size, **kwargs})
        logged = {name for _, calls in self._runs for name in calls}
        self._say_level({name for name in logged if len(self._levels.get(name, ())) > 1})
        self._runs, self._metrics, self._final, self.outputs = [], None, None, []
        return logged

    def _say_level(self, names: set[str]) -> None:
        """Say once of names that both losses log which of the two values is there."""
        if new := sorted(names - self._said):
            self._said |= names
            rank_zero_info(
                f"Both losses log {', '.join(f'`{name}`' for name in new)}: what is logged is the value of the outer "
                "loss, at θ_T. `inner_loss`, that of the last inner step, is logged by itself."
            )


class Observed(NamedTuple):
    """What stood when an outer loss had been evaluated.

    Attributes:
        calls: to log.
        metrics: their states.
        buffers: those that the losses change.
        before: plain attributes before the outer loss.
        after: plain attributes after it.
        beside: what it returned beside its value.
    """

    calls: dict[str, _Call]
    metrics: State
    buffers: Params
    before: Snapshot
    after: Snapshot
    beside: dict[str, Any]


def primal(value: Any) -> Any:
    """Take a value out of function transforms; the mean over episodes where it was vectorized over them.

    >>> import torch
    >>> primal(torch.ones(2, requires_grad=True))
    tensor(1.)
    """
    if not isinstance(value, Tensor):
        return value
    value, _ = unwrapped(usable(value).detach())
    return value.float().mean() if value.ndim else value
