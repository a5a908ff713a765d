"""``self.log`` and metrics inside losses: kept aside while derivatives are taken, logged once afterwards."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torchmetrics import Metric

from lightning_bilevel.host import LightningModule
from lightning_bilevel.modules.attributes import Attributes, Snapshot, once, plain
from lightning_bilevel.modules.outputs import beside_loss, by_episode
from lightning_bilevel.tree import Params

_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class LogRecorder:
    """Shadows ``log`` and ``log_dict`` of a module, and replays each name once.

    A loss runs many times per training step: at every inner step, again where a strategy recomputes or perturbs, and
    inside function transforms, where Lightning's own ``log`` raises. Replayed is what had been logged when the outer
    loss was evaluated that the estimate reports, at θ_T. A run lasts from :meth:`begin` to :meth:`end`; what is logged
    outside of runs is dropped. Metrics that a loss updates count likewise, once per run, if they are replayed.

    Attributes:
        outputs: of each episode, what that outer loss returned beside its value.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[int, dict[str, _Call]]] = []
        self._running = False
        self._latest: dict[str, _Call] = {}
        self._metrics: list[_RecordedMetric] = []
        self._attributes: Attributes | None = None
        self._start: Snapshot = []
        self._before: Snapshot = []
        self._final: Snapshot | None = None
        self._buffers: Params = {}
        self._beside: dict[str, Any] = {}
        self.outputs: list[dict[str, Any]] = []

    @contextmanager
    def recording(self, module: LightningModule) -> Iterator[None]:
        """Shadow the methods on the instance; remove the shadows on exit. What was kept before is forgotten.

        A LightningModule that is a child logs through the same Trainer, so its methods are shadowed too.
        """
        self._runs, self._running, self._final, self.outputs = [], False, None, []
        self._attributes = attributes = Attributes(module)
        self._start = attributes.take()
        loggers = [child for child in module.modules() if isinstance(child, LightningModule)]
        shadowed: list[dict[str, Any]] = [
            {name: child.__dict__[name] for name in ("log", "log_dict") if name in child.__dict__} for child in loggers
        ]
        for child in loggers:
            child.__dict__.update(log=self.log, log_dict=self.log_dict)
        metrics = [child for child in module.modules() if isinstance(child, Metric)]
        self._metrics = [_RecordedMetric(metric, lambda: self._running) for metric in metrics]
        try:
            with ExitStack() as stack:
                for recorded in self._metrics:
                    stack.enter_context(recorded.recording())
                yield
        finally:
            for child, before in zip(loggers, shadowed, strict=True):
                del child.__dict__["log"], child.__dict__["log_dict"]
                child.__dict__.update(before)
            attributes.put(self._start)

    def begin(self) -> None:
        """Begin a run."""
        self._running, self._latest, self._buffers, self._beside = True, {}, {}, {}
        for metric in self._metrics:
            metric.begin()

    def before_outer_loss(self) -> None:
        """Note the attributes that an outer loss starts from."""
        if self._running and self._attributes is not None:
            self._before = self._attributes.take()

    def after_outer_loss(self, buffers: Params, result: Any) -> None:
        """Note the buffers that an outer loss has left, and what it returned."""
        self._buffers, self._beside = buffers, beside_loss(result)

    def observe(self) -> Observed | None:
        """Return what has been left behind in this run."""
        if not self._running or self._attributes is None:
            return None
        states = [metric.present() for metric in self._metrics]
        return Observed(dict(self._latest), states, self._buffers, self._before, self._attributes.take(), self._beside)

    def end(self, observed: Any, count: int) -> Params:
        """End the run of ``count`` episodes; what stood at ``observed`` counts.

        Returns:
            The buffers that the outer loss left, stacked where there are several episodes.
        """
        self._running = False
        if not isinstance(observed, Observed):
            return {}
        self._runs.append((count, observed.calls))
        for metric, state in zip(self._metrics, observed.metrics, strict=True):
            metric.end(state)
        self.outputs += by_episode(observed.beside, count)
        self._beside = {}
        self._final = once(self._start, observed.before, observed.after)
        return {name: plain(value) for name, value in observed.buffers.items()}

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the value for later."""
        if self._running:
            self._latest[name] = (_primal(value), args, kwargs)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Keep the values for later."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def replay(self, module: LightningModule, batch_size: int) -> None:
        """Log each name once, with its mean over the episodes; let the metrics count.

        Args:
            module: the module.
            batch_size: weight of this step in an epoch's mean, unless the call that was kept says otherwise.
        """
        for metric in self._metrics:
            metric.replay()
        if self._final is not None and self._attributes is not None:
            self._attributes.put(self._final)
        for name in dict.fromkeys(name for _, calls in self._runs for name in calls):
            calls = [(count, calls[name]) for count, calls in self._runs if name in calls]
            _, (value, args, kwargs) = calls[-1]
            if len(calls) > 1 and isinstance(value, (Tensor, numbers.Number)):
                value = sum(count * call[0] for count, call in calls) / sum(count for count, _ in calls)
            module.log(name, value, *args, **{"batch_size": batch_size, **kwargs})
        self._runs, self._metrics, self._final, self.outputs = [], [], None, []


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
    metrics: list[dict[str, Any]]
    buffers: Params
    before: Snapshot
    after: Snapshot
    beside: dict[str, Any]


class _RecordedMetric:
    """One metric, whose updates inside losses take plain tensors and count once per run.

    Args:
        metric: the metric.
        running: whether a run goes on.
    """

    def __init__(self, metric: Metric, running: Callable[[], bool]) -> None:
        self._metric, self._running = metric, running
        self._start = self._end = self.present()
        self._inside = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Shadow the methods that update; on exit the metric is as it was."""
        before, attributes = self.present(), self._metric.__dict__
        shadowed: dict[str, Any] = {name: attributes[name] for name in ("forward", "update") if name in attributes}
        attributes.update({name: self._shadow(getattr(self._metric, name)) for name in ("forward", "update")})
        try:
            yield
        finally:
            del attributes["forward"], attributes["update"]
            attributes.update(shadowed)
            self._restore(before)

    def present(self) -> dict[str, Any]:
        """Return a copy of the metric's state."""
        names = [*self._metric._defaults, "_update_count", "_computed", "_forward_cache"]
        return {name: _copied(getattr(self._metric, name)) for name in names}

    def begin(self) -> None:
        """Begin a run: each of its updates starts from the present state."""
        self._start = self.present()

    def end(self, state: dict[str, Any]) -> None:
        """End a run in ``state``, from which the next goes on."""
        self._end = state
        self._restore(state)

    def replay(self) -> None:
        """Put the state in place that the runs led to."""
        self._restore(self._end)

    def _shadow(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def shadow(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # ``forward`` calls ``update``
                return original(*args, **kwargs)
            # Inside a transform even what is made of plain tensors would belong to it, and outlive it in the state.
            with torch._C._DisableFuncTorch():
                before = self.present()
                if self._running():
                    self._restore(self._start)
                self._inside = True
                try:
                    args, kwargs = _examples((args, kwargs))
                    return original(*args, **kwargs)
                finally:
                    self._inside = False
                    if not self._running():
                        self._restore(before)

        return shadow

    def _restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self._metric, name, _copied(value))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value


def _examples(values: Any) -> Any:
    """Take what a metric gets out of function transforms; vectorized episodes become one batch."""
    leaves, structure = tree_flatten(values)
    episodes: list[tuple[int, ...]] = []
    for position, leaf in enumerate(leaves):
        episodes.append(())
        if not isinstance(leaf, Tensor):
            continue
        while torch._C._functorch.is_functorch_wrapped_tensor(leaf):
            dimension = torch._C._functorch.maybe_get_bdim(leaf)
            leaf = torch._C._functorch.get_unwrapped(leaf)
            if dimension >= 0:
                leaf = leaf.movedim(dimension, 0)
                episodes[-1] = (len(leaf), *episodes[-1])
        leaves[position] = leaf.detach()
    widest = max(episodes, key=len, default=())
    if widest:
        for position, own in enumerate(episodes):
            leaf = leaves[position]
            if isinstance(leaf, Tensor):
                shape = leaf.shape[len(own) :]
                leaf = leaf if own else leaf.expand(*widest, *shape)
                leaves[position] = leaf.reshape(-1, *shape[1:])
    return tree_unflatten(leaves, structure)


def _primal(value: Any) -> Any:
    """Take a value out of function transforms; the mean over episodes where it was vectorized over them."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value.float().mean() if value.ndim else value
