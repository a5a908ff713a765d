"""What a loss leaves besides its value: what it logs, the metrics that it calls, what it returns beside.

A graph returns the tensors of all that. What is done with them is done afterwards, by the user's metrics themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch._C._functorch import _add_batch_dim
from torchmetrics import Metric, MetricCollection

from lightning_bilevel.compiled.beside import Beside, without_tensors
from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.modules.metrics import Later, unwrapped
from lightning_bilevel.modules.recorder import LogRecorder
from lightning_bilevel.stacking import nested, replaced
from lightning_bilevel.tree import Params

Log = dict[Any, tuple[Any, tuple[Any, ...], dict[str, Any]]]
"""What a loss logs while it is traced: ``self.log(name, value, *args, **kwargs)`` by its name."""


class Logged(NamedTuple):
    """What a loss logs; ``value`` is ``None`` for an output of a graph.

    Where it is what a metric will say, and that is a dict of names, ``name`` is the number of the metric's call.
    """

    name: Any
    value: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def described(logged: Log) -> list[Logged]:
    """Return what is logged, as it is said of a graph."""
    return [
        Logged(name, None if isinstance(value, Tensor) else value, args, kwargs)
        for name, (value, args, kwargs) in logged.items()
    ]


def tensors_of(logged: Log) -> list[Tensor]:
    """Return the tensors that are logged."""
    return [value.detach() for value, _, _ in logged.values() if isinstance(value, Tensor)]


def count_of(logged: Sequence[Logged]) -> int:
    """Return how many tensors are logged."""
    return sum(each.value is None for each in logged)


def log_all(
    logged: Sequence[Logged], results: Sequence[Tensor], log: Callable[..., None], said: Sequence[Any] = ()
) -> None:
    """Log what a graph has returned of it, the first of these results, and what the metrics have said."""
    values = iter(results)
    for name, value, args, kwargs in logged:
        if not isinstance(value, Later):
            log(name, next(values) if value is None else value, *args, **kwargs)
        elif isinstance(name, int):
            for key, each in said[name].items():
                log(key, each, *args, **kwargs)
        else:
            log(name, said[value.number], *args, **kwargs)


class Called(NamedTuple):
    """A call of a metric's method.

    Attributes:
        metric: the metric, or a collection.
        method: of it.
        given: the arguments without their tensors.
        levels: of each of these tensors, the function transforms that vectorized it, as :func:`unwrapped` has them.
    """

    metric: Metric | MetricCollection
    method: str
    given: tuple[tuple[Any, ...], dict[str, Any]]
    levels: Sequence[Sequence[int]]


class Taken:
    """Takes what losses log, and the calls of metrics, while they are traced.

    Of evaluations one after the other, the calls of the last one are those that count, and so are its logs.

    Args:
        recorder: of the losses.
        outer: whether it is the outer loss alone that is traced.

    Attributes:
        log: what is logged.
        made: the calls.
        tensors: those of their arguments, one after the other, out of function transforms.
    """

    def __init__(self, recorder: LogRecorder, outer: bool) -> None:
        self.log: Log = {}
        self.made: list[Called] = []
        self.tensors: list[Tensor] = []
        self._recorder, self._outer = recorder, outer
        self._said: list[Later] = []
        self._evaluation: int | None = None

    def instead(self, metric: Metric | MetricCollection, method: str) -> Callable[..., Later]:
        """Return what is called in the place of a metric's method."""
        return functools.partial(self._take, metric, method)

    def _take(self, metric: Metric | MetricCollection, method: str, /, *args: Any, **kwargs: Any) -> Later:
        if self._recorder.in_outer_loss and not self._outer:
            raise NotCompiled("the strategy steps on an outer loss that calls a metric")
        number = self._recorder.evaluation_number
        if number is None:
            return Later()
        if number != self._evaluation:
            self._evaluation, self.made, self.tensors, self._said = number, [], [], []
        given, tensors = without_tensors((args, kwargs), "it gives a metric")
        found = [unwrapped(tensor.detach()) for tensor in tensors]
        self.made.append(Called(metric, method, given, [levels for _, levels in found]))
        self.tensors += [tensor for tensor, _ in found]
        self._said.append(Later(len(self.made) - 1))
        return self._said[-1]

    def left(self, beside: Beside) -> Left:
        """Return what the losses have left."""
        for value, _, _ in self.log.values():
            if isinstance(value, Later) and not any(value is each for each in self._said):
                raise NotCompiled("what it logs of its metrics is another thing at every step")
        return Left(beside, self.made, described(self.log))


@contextmanager
def called(calls: Sequence[Called], tensors: Sequence[Tensor], functional: FunctionalModule) -> Iterator[list[Any]]:
    """Call metrics with these tensors, as a loss would have; yield what they say, in the same function transforms."""
    if not calls:
        yield []
        return
    sizes: dict[int, int] = {}
    each_levels = [levels for call in calls for levels in call.levels]
    for tensor, levels in zip(tensors, each_levels, strict=True):
        sizes.update(zip(levels, tensor.shape, strict=False))
    functional.turn()
    with functional.recorder.evaluation(), functional.in_place({}), _vectorized(sizes) as wrapped:
        values = iter([wrapped(tensor, levels) for tensor, levels in zip(tensors, each_levels, strict=True)])
        said = []
        for metric, method, given, _ in calls:
            args, kwargs = replaced(given, lambda _: next(values))
            said.append(getattr(metric, method)(*args, **kwargs))
        yield said


@contextmanager
def _vectorized(sizes: dict[int, int]) -> Iterator[Callable[[Tensor, Sequence[int]], Tensor]]:
    """Enter transforms in the places of those that there were, by size; yield what puts a tensor into some of them."""
    with ExitStack() as stack:
        now = {level: stack.enter_context(nested(sizes[level], "different")) for level in sorted(sizes)}

        def wrapped(tensor: Tensor, levels: Sequence[int]) -> Tensor:
            for level in levels:
                tensor = _add_batch_dim(tensor, 0, now[level])
            return tensor

        yield wrapped


class Left(NamedTuple):
    """What a loss leaves besides its value and buffers.

    Attributes:
        beside: what it returns beside its value; nothing of an inner one.
        calls: the metrics that it calls.
        logged: what it logs.
    """

    beside: Beside = Beside()
    calls: Sequence[Called] = ()
    logged: Sequence[Logged] = ()

    @property
    def total(self) -> int:
        """How many tensors there are, with what is logged."""
        return self.size + count_of(self.logged)

    @property
    def size(self) -> int:
        """How many tensors there are but for what is logged."""
        return self.beside.size + sum(len(call.levels) for call in self.calls)

    def tell(
        self, tensors: Sequence[Tensor], logs: Sequence[Tensor], log: Callable[..., None], functional: FunctionalModule
    ) -> None:
        """Call the metrics, and log."""
        with called(self.calls, tensors[self.beside.size :], functional) as said:
            log_all(self.logged, logs, log, said)

    def tell_last(self, results: Sequence[Tensor], functional: FunctionalModule) -> None:
        """Call the metrics, and log, with the last of what a graph has returned."""
        if self.calls or self.logged:
            tensors = results[len(results) - self.total :]
            self.tell(tensors[: self.size], tensors[self.size :], functional.recorder.log, functional)

    def leave(
        self,
        functional: FunctionalModule,
        buffers: Params,
        value: Tensor,
        tensors: Sequence[Tensor],
        logs: Sequence[Tensor],
    ) -> None:
        """Leave what an outer loss does in eager.

        Args:
            functional: the module.
            buffers: as the loss left them.
            value: of the loss.
            tensors: of what it returned beside and gave to metrics.
            logs: those that it logged.
        """
        recorder = functional.recorder
        recorder.before_outer_loss(writes=False)
        self.tell(tensors, logs, recorder.log, functional)
        beside = self.beside.filled(tensors[: self.beside.size])
        recorder.after_outer_loss(buffers, {"loss": value, **beside})


class Spot(NamedTuple):
    """Where the outputs of a graph are that a loss leaves.

    Attributes:
        left: what that is.
        aside: the numbers of those but for what is logged.
        logs: the numbers of what is logged.
    """

    left: Left
    aside: range
    logs: range
