"""Torchmetrics metrics inside losses: their values are the user's, and they count once per run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torchmetrics import Metric, MetricCollection

from lightning_bilevel.modules.parts import parts

State = dict[int, dict[str, Any]]
"""What metrics hold besides their settings, by their place among the metrics of a module."""

Instead = Callable[[Any, str], Callable[..., Any]]
"""Of a metric, or a collection, and the name of a method: what is called in its place."""

_CALLS = ("forward", "update", "compute", "reset")
_OF_MODULES = set(vars(nn.Module()))
_SETTINGS = {*_OF_MODULES, *_CALLS, "_update_signature", "_persistent", "_reductions", "_device", "_dtype"}

_HOLDERS = (nn.Module, list, tuple, dict)
"""What a metric may be in."""

_STAYS = {*_SETTINGS, "_defaults"}
"""What can be read of a metric without what it counts; the last is in its hash."""

_WIDTH = 1_000
"""A longer list holds data, not metrics."""


class RecordedMetrics:
    """The metrics of a module while its losses run over and over.

    Each evaluation of a loss finds them as they stood when the estimate began, and what it computes with them is
    differentiated as it is written. What the last one leaves in them is noted, and counts: of all episodes, one after
    the other or as one batch. Where the two differ, as inside function transforms, a metric is called twice, with the
    tensors that it gets for its value, and with plain ones for what it counts.

    Args:
        module: the module; metrics in lists, tuples and dicts on it are found, too.

    Attributes:
        latest: the state that the last evaluations left.
        which: tells these metrics from others.
        evaluation_number: of the evaluation that runs; ``None`` where that runs a part of a loss again.
    """

    def __init__(self, module: nn.Module) -> None:
        found = list(_modules_of(module))
        self._metrics = [each for each in found if isinstance(each, Metric)]
        self._collections = [each for each in found if isinstance(each, MetricCollection)]
        self.which = tuple(map(id, (*self._metrics, *self._collections)))
        self._start = self._counted = self.latest = self._plain(range(len(self._metrics)))
        self._evaluating = self._inside = False
        self._evaluations = 0
        self.evaluation_number: int | None = 0
        self._touched: set[int] = set()
        self._wrapped: State = {}
        self._failed: dict[int, Exception] = {}

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self._metrics)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Shadow the methods that read or write their state; on exit they are as they were."""
        if not self._metrics and not self._collections:
            yield
            return
        places = {id(metric): place for place, metric in enumerate(self._metrics)}
        before = self._start
        with ExitStack() as stack:
            for collection in self._collections:  # where some share one state, the others are not called
                groups = {number: [str(name)] for number, name in enumerate(collection._modules)}
                alone = {"_groups_checked": False, "_enable_compute_groups": False, "_state_is_copy": False}
                stack.enter_context(_changed(collection, {"_groups": groups, **alone}))
            for metric in self._metrics:
                family = [places[id(each)] for each in _modules_of(metric) if id(each) in places]
                stack.enter_context(_changed(metric, {name: self._shadow(metric, name, family) for name in _CALLS}))
            self.replay()  # what may be written to from here on are copies
            try:
                yield
            finally:
                self._put(before)

    def begin(self) -> None:
        """Begin a run."""
        self.latest = self._counted

    def end(self, state: State) -> None:
        """End a run in ``state``, from which the next goes on."""
        self._counted = state
        self.replay()

    def replay(self) -> None:
        """Put the state in place that the runs led to."""
        self._put(self._counted)

    @contextmanager
    def evaluation(self, counts: bool = True) -> Iterator[None]:
        """Evaluate a loss.

        Args:
            counts: whether what it leaves is noted; not so where a part of a loss is run again.
        """
        outside = self._evaluating, self._touched, self._wrapped, self._failed
        kept = self._state(self._touched)  # where part of a loss is run again within the loss
        self._put({place: self._counted[place] for place in self._touched})
        self._evaluating, self._touched, self._wrapped, self._failed = True, set(), {}, {}
        self._evaluations += counts
        before, self.evaluation_number = self.evaluation_number, self._evaluations if counts else None
        try:
            yield
            if self._touched and counts:
                self.latest = {**self.latest, **self._plain(self._touched)}
        finally:
            self._put({place: self._counted[place] for place in self._touched})
            self._evaluating, self._touched, self._wrapped, self._failed = outside
            self.evaluation_number = before
            self._set(kept)

    @contextmanager
    def replaced(self, instead: Instead) -> Iterator[None]:
        """Have other functions called in the places of metrics' methods; what they have counted cannot be read then."""
        with ExitStack() as stack:
            for each in (*self._metrics, *self._collections):
                values: dict[str, Any] = {name: instead(each, name) for name in _CALLS}
                if isinstance(each, Metric):
                    values.update((name, Later()) for name in vars(each) if name not in _STAYS)
                else:
                    values["_state_is_copy"] = False  # which a loop over a collection changes
                stack.enter_context(_changed(each, values))
            yield

    def _shadow(self, metric: Metric, name: str, family: list[int]) -> Callable[..., Any]:
        original = getattr(metric, name)

        def shadow(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # ``forward`` calls ``update``
                return original(*args, **kwargs)
            if not self._evaluating:  # in a user's solver
                with self.evaluation():
                    return shadow(*args, **kwargs)
            self._touched.update(family)
            self._inside = True
            try:
                if self._counted is self._start and not torch._C._are_functorch_transforms_active():
                    return original(*args, **kwargs)
                return self._apart(original, family, args, kwargs)
            finally:
                self._inside = False

        return shadow

    def _apart(self, original: Callable[..., Any], family: list[int], args: Any, kwargs: Any) -> Any:
        """Count, and compute the value apart from that."""
        # What is made inside a transform, of plain tensors too, belongs to it: a state would outlive it.
        with torch._C._DisableFuncTorch():
            plain_args, plain_kwargs = _examples((args, kwargs))
            counted = original(*plain_args, **plain_kwargs)
        if family[0] not in self._failed:
            kept = self._state(family)
            try:
                self._set(self._lifted(family, args, kwargs))
                value = original(*args, **kwargs)
                self._wrapped.update(self._state(family))
                return value
            except Exception as error:  # vmap cannot run all of them
                self._failed.update(dict.fromkeys(family, error.with_traceback(None)))
            finally:
                self._set(kept)
        reason = self._failed[family[0]]
        return tree_map_only(Tensor, lambda tensor: Unusable.of(tensor, reason), counted)

    def _lifted(self, family: list[int], args: Any, kwargs: Any) -> State:
        """Return the state within this evaluation, once for each of what the arguments are vectorized over."""
        state = {place: self._wrapped.get(place, self._start[place]) for place in family}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and unwrapped(leaf)[1]]
        if not leaves:
            return tree_map_only(Tensor, torch.clone, state)
        zero: Any = sum(torch.zeros_like(leaf.detach().reshape(-1)[:0], dtype=torch.float).sum() for leaf in leaves)
        return tree_map_only(Tensor, lambda tensor: tensor + zero.to(tensor), state)

    def _state(self, places: Sequence[int] | set[int] | range) -> State:
        return {
            place: {name: value for name, value in vars(self._metrics[place]).items() if name not in _SETTINGS}
            for place in places
        }

    def _set(self, state: State) -> None:
        for place, values in state.items():
            attributes = vars(self._metrics[place])
            for name in [name for name in attributes if name not in _SETTINGS and name not in values]:
                del attributes[name]
            attributes.update(values)

    def _plain(self, places: Sequence[int] | set[int] | range) -> State:
        """Return the state without graphs, in containers of its own."""
        if not places:
            return {}
        with torch._C._DisableFuncTorch():
            return {place: _each_tensor(torch.detach, values) for place, values in self._state(places).items()}

    def _put(self, state: State) -> None:
        """Put copies in place, which may be written to."""
        if not state:
            return
        with torch._C._DisableFuncTorch():
            self._set({place: _each_tensor(torch.clone, values) for place, values in state.items()})


def _each_tensor(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return what holds the results of a function of tensors, in containers of its own.

    What a state is made of for the most part is taken by hand, in a fifth of the time of torch's trees.
    """
    if isinstance(value, Tensor):
        return function(value)
    kind = type(value)
    if kind is list:
        return [_each_tensor(function, part) for part in value]
    if kind is dict:
        return {key: _each_tensor(function, part) for key, part in value.items()}
    return tree_map_only(Tensor, function, value) if isinstance(value, (list, tuple, dict, deque)) else value


class Unusable(Tensor):
    """The value over all episodes of a stack, where ``vmap`` cannot run a metric for each: to be logged, and no more.

    >>> value = Unusable.of(torch.tensor(0.5), RuntimeError("vmap cannot run this."))
    >>> usable(value)
    tensor(0.5000)
    >>> value * 2
    Traceback (most recent call last):
    RuntimeError: vmap cannot run this.
    """

    error: Exception

    @classmethod
    def of(cls, value: Tensor, error: Exception) -> Unusable:
        """Return ``value`` in this guise; what uses it raises ``error``."""
        made = value.as_subclass(cls)
        vars(made)["error"] = error
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise what stood in the way."""
        raise next(vars(leaf)["error"] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Unusable))


def usable(value: Any) -> Any:
    """Return what may be logged as a plain tensor."""
    if not isinstance(value, Unusable):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


class Later:
    """What a metric says where it is called later, and what it has counted: it can be logged, and no more.

    Args:
        number: of the call.

    >>> bool(Later(0))
    Traceback (most recent call last):
    TypeError: a 'Later' cannot be used
    """

    def __init__(self, number: int = -1) -> None:
        self.number = number

    def _unknown(self, *args: Any) -> Any:
        raise TypeError("a 'Later' cannot be used")

    __bool__ = __eq__ = __ne__ = __str__ = __format__ = _unknown
    __hash__ = object.__hash__


def _modules_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield all modules once, those too that are in lists, tuples and dicts, where PyTorch does not look."""
    seen: set[int] = set()
    waiting: list[Any] = [module]
    while waiting:
        each = waiting.pop(0)
        if isinstance(each, (list, tuple, dict)):
            if id(each) in seen:
                continue
            seen.add(id(each))
            inside = () if len(each) > _WIDTH else each.values() if isinstance(each, dict) else each
            waiting += [part for part in inside if isinstance(part, _HOLDERS)]
            continue
        for child in parts(each):
            if id(child) not in seen:
                seen.add(id(child))
                yield child
                attributes = vars(child)
                if own := attributes.keys() - _OF_MODULES:
                    waiting += [each for name, each in attributes.items() if name in own and isinstance(each, _HOLDERS)]


@contextmanager
def _changed(owner: nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """Change attributes of an instance for a while."""
    attributes = vars(owner)
    before = {name: attributes[name] for name in values if name in attributes}
    attributes.update(values)
    try:
        yield
    finally:
        for name in values:
            attributes.pop(name, None)
        attributes.update(before)


def unwrapped(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """Take a tensor out of function transforms.

    Returns:
        The tensor within, and the levels of the transforms that vectorized it: of each, one of its first dimensions.
    """
    levels: list[int] = []
    batched: list[int] = []
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        dimension = torch._C._functorch.maybe_get_bdim(tensor)
        if dimension >= 0:
            batched.append(dimension)
            levels.append(torch._C._functorch.maybe_get_level(tensor))
        tensor = torch._C._functorch.get_unwrapped(tensor)
    for number, dimension in enumerate(reversed(batched)):  # each counts those that are left inside of it
        tensor = tensor.movedim(dimension + number, number)
    return tensor, levels[::-1]


def _examples(values: Any) -> Any:
    """Take what a metric gets out of function transforms; vectorized episodes become one batch."""
    leaves, structure = tree_flatten(values)
    found = {place: unwrapped(leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    sizes = {level: size for leaf, levels in found.values() for level, size in zip(levels, leaf.shape, strict=False)}
    for place, (leaf, levels) in found.items():
        leaf = leaf.detach()
        if sizes:
            shape = leaf.shape[len(levels) :]
            own = leaf.reshape(*(sizes[level] if level in levels else 1 for level in sorted(sizes)), *shape)
            leaf = own.expand(*(sizes[level] for level in sorted(sizes)), *shape).reshape(-1, *shape[1:])
        leaves[place] = leaf
    return tree_unflatten(leaves, structure)
