"""When graphs that were traced before are still what the user's Python would do: Dynamo's guards decide.

A trace writes down what one run did and looks at nothing later. So the same Python goes through Dynamo too, whose graph
is thrown away: its guards are asked before each run of inner steps (some 15 µs), and what it cannot follow is not
compiled. What the guards leave out is in :mod:`~lightning_bilevel.compiled.unguarded`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from contextlib import nullcontext
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_bilevel.compiled.beside import looked_at
from lightning_bilevel.compiled.reasons import NotCompiled, reason
from lightning_bilevel.compiled.recurrent import Recurrent
from lightning_bilevel.compiled.unguarded import Unguarded
from lightning_bilevel.generators import process_generators
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.inner_optimizers.base import is_ours
from lightning_bilevel.kernels.safe import in_place
from lightning_bilevel.modules.attributes import Attributes, Snapshot
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.modules.metrics import Later
from lightning_bilevel.modules.outputs import beside_loss
from lightning_bilevel.modules.parts import parts
from lightning_bilevel.modules.returned import scalar
from lightning_bilevel.problem import Batch
from lightning_bilevel.stacking import copied, leaves_in, tensors_in

Level = Literal["inner", "outer"]

MOST_STATES = 4
"""Different things that a loss or an update may do before it is left to eager; each takes seconds to compile."""


_FUNCTIONS = ("custom jvp", "custom vjp", "autograd.Function", "autograd_function")
"""What Dynamo says of autograd functions that it does not follow where gradients are taken."""


class Watch:
    """Tells which of the things it has done so far a function does now, with nothing computed.

    Args:
        function: returns one tensor.
        module: to whose attributes it may write.

    Attributes:
        state: number of what it did at the last call; another one when an attribute, a mode or a shape is another.
        inputs: the tensors that it read at the last call, its arguments and others.
    """

    def __init__(self, function: Callable[..., Tensor], module: nn.Module) -> None:
        self.state, self.inputs = 0, tuple[Any, ...]()
        self._module, self._unguarded = module, list[Unguarded]()
        self._with_gradients, self._differentiates = True, False
        self._attributes: tuple[Attributes, Snapshot] | None = None
        code = function.__code__.replace(co_name=f"watched_{id(self)}")  # Dynamo's limit of states is for each code
        copy = FunctionType(code, function.__globals__, closure=function.__closure__)
        self._args: tuple[Any, ...] = ()
        self._copy = copy
        self._function = torch.compile(copy, backend=self._backend, fullgraph=True, dynamic=False)

    def look(self, *args: Any) -> Hashable:
        """Return what tells the present from other times: the state, and what no guard is for.

        Raises:
            NotCompiled: Dynamo cannot follow, there have been too many states, or it writes to attributes.
        """
        while True:
            try:
                self._called(args)
                break
            except Exception as error:  # Dynamo's, of many kinds, and the user's
                if not self._otherwise(reason(error)):
                    raise NotCompiled(reason(error)) from error
        if not self.state:
            raise NotCompiled("`torch.compile` is switched off")
        if self._attributes is not None:  # a new state: what Python does besides is done by now
            attributes, before = self._attributes
            if attributes.put(before):
                raise NotCompiled("it writes to an attribute of the module")
        beside = self._unguarded[self.state - 1].now(args)
        return self.state if beside is None else (self.state, beside)

    def _called(self, args: tuple[Any, ...]) -> None:
        self.state, self.inputs, self._attributes, self._args = 0, (), None, args
        config: Any = torch._dynamo.config
        try:
            with torch.set_grad_enabled(self._with_gradients):
                with config.patch(trace_autograd_ops=True) if self._differentiates else nullcontext():
                    self._function(*args)
        finally:
            self._args = ()

    def _otherwise(self, because: str) -> bool:
        """Return whether there is another way for Dynamo to follow, taken from now on.

        Derivatives that a loss takes it follows if it is told to, which costs time at every look; autograd functions of
        some kinds, such as those that have a ``jvp``, only where no gradients are taken.
        """
        if not self._differentiates and "trace_autograd_ops" in because:
            self._differentiates = True
            return True
        if self._with_gradients and any(words in because for words in _FUNCTIONS):
            self._with_gradients = False
            return True
        return False

    def _backend(self, graph: Any, examples: Any) -> Any:
        if len(list(graph.graph.nodes)[-1].args[0]) != 1:  # the others are what it writes to the module, or logs
            raise NotCompiled("it leaves tensors behind besides its value: an attribute, a log, a metric")
        if len(self._unguarded) == MOST_STATES:
            raise NotCompiled(f"it has done {MOST_STATES} different things so far, by an attribute that changes, say")
        attributes = Attributes(self._module)
        self._attributes = attributes, attributes.take()
        self._unguarded.append(Unguarded(self._copy, self._args))
        number, nothing = len(self._unguarded), [torch.empty(())]

        def remember(*args: Any) -> list[Tensor]:
            self.state, self.inputs = number, args
            return nothing

        return remember


class Watchman:
    """Watches a loss of a module on batches of one kind, and the inner optimizer's update and penalty.

    Args:
        functional: the module.
        batch: an example of one episode: tensors of the right shapes, whatever their numbers, and all else as it is;
            it is kept.
        level: of the loss.

    Attributes:
        loss: the watch of the loss.
        examples: tensors that are only examples of what the losses get.
    """

    def __init__(self, functional: FunctionalModule, batch: Batch, level: Level = "inner") -> None:
        module = functional.module
        hook = f"{level}_loss"

        def loss(batch: Batch) -> Tensor:  # with the module's own parameters: guards do not look at values
            if level == "inner":
                return scalar(module, hook, module.inner_loss(batch))
            result = module.outer_loss(batch)
            return looked_at(scalar(module, hook, result), beside_loss(result))

        def update(theta: Any, converted: Any, number: int) -> Tensor:
            optimizer: Any = module.configure_inner_optimizer() if converted is None else converted
            after, opt_state = optimizer.update(theta, theta, optimizer.init(theta), number)
            values = [*after.values(), *(value for values in opt_state.values() for value in values.values())]
            return torch.stack([value.real.sum() for value in values]).sum()

        def configured() -> Tensor:
            optimizer: Any = module.configure_inner_optimizer()
            return torch.zeros(()) + len(vars(optimizer))

        def penalty(theta: Any, converted: Any) -> Tensor:
            optimizer: Any = module.configure_inner_optimizer() if converted is None else converted
            value = optimizer.penalty(theta)
            return value + torch.zeros(()) if isinstance(value, Tensor) else torch.zeros(()) + value

        self._module, self._batch, self._update = module, batch, update
        self.loss, self._penalty = Watch(loss, module), Watch(penalty, module)
        self._configured = Watch(configured, module)
        self._updates: dict[int, Watch] = {}
        self._seen: dict[Hashable, tuple[Hashable, Hashable]] = {}
        self._theta = functional.theta()
        self._recurrent = Recurrent(module)
        self.examples = {id(value) for value in (*tensors_in(batch), *self._theta.values())}

    def look(self, functional: FunctionalModule) -> Hashable:
        """Return what tells the present of the loss, and of all around, from other times.

        Args:
            functional: the module, whose session is entered.

        Raises:
            NotCompiled: Dynamo cannot follow.
        """
        around = _surroundings(self._module, functional), functional.recorder.metrics

        def look() -> Hashable:
            under = functional.in_place({}) if functional.autocast_dtype is not None else nullcontext()
            with functional.recorder.apart(_looked_at, _measured), under, self._recurrent.followed():
                return self.loss.look(copied(self._batch))  # a loss may take it apart

        return self._once("loss", functional, around, look), around

    def look_at_update(self, functional: FunctionalModule, number: int) -> Hashable:
        """Return what tells the present of an update from other times, like :meth:`look`.

        Args:
            functional: the module.
            number: of the update, from 1.
        """
        if (numbers := self._look_at_numbers(functional)) is not None:
            return numbers
        watch, converted = self._watch_of_update(number), functional.converted()
        return self._once(number, functional, 0, lambda: watch.look(self._theta, converted, number))

    def look_at_penalty(self, functional: FunctionalModule) -> Hashable:
        """Return what tells the present of the inner optimizer's penalty from other times, like :meth:`look`."""
        if (numbers := self._look_at_numbers(functional)) is not None:
            return numbers
        converted = functional.converted()
        return self._once("penalty", functional, 0, lambda: self._penalty.look(self._theta, converted))

    def _look_at_numbers(self, functional: FunctionalModule) -> Hashable | None:
        """Return what tells the present of an inner optimizer of ours from other times where it goes by numbers alone.

        Nothing else of it can change than these, and how it is made: there are far fewer guards for that than for an
        update. ``None`` where it goes by other things.
        """

        def look() -> Hashable | None:
            if (numbers := constants(functional.inner_optimizer())) is None:
                return None
            return numbers, 0 if functional.converted() is not None else self._configured.look()

        return self._once("numbers", functional, 0, look)

    def _once(
        self, what: Hashable, functional: FunctionalModule, around: Hashable, look: Callable[[], Hashable]
    ) -> Hashable:
        """Return the state, looked up anew where code of the user's may have changed it since."""
        now = functional.turns, around
        if self._seen.get(what, (None, 0))[0] != now:
            self._seen[what] = now, look()
        return self._seen[what][1]

    def of_optimizer(self, numbers: Collection[int], penalty: bool) -> list[Watch]:
        """Return the watches of some updates, and of the penalty; none where the inner optimizer goes by numbers."""
        if self._seen.get("numbers", (0, None))[1] is not None:
            return []
        return [*map(self._watch_of_update, numbers), *([self._penalty] * penalty)]

    def _watch_of_update(self, number: int) -> Watch:
        if number not in self._updates:
            self._updates[number] = Watch(self._update, self._module)
        return self._updates[number]


def constants(optimizer: InnerOptimizer) -> Hashable | None:
    """Return all that an optimizer of ours goes by, where that is numbers; ``None`` where it is not.

    >>> from lightning_bilevel import SGD
    >>> constants(SGD(0.1)) == constants(SGD(0.1)), constants(SGD(0.1)) == constants(SGD(0.2))
    (True, False)
    """
    if not is_ours(optimizer):
        return None
    marks: list[Hashable] = [type(optimizer)]
    for name, value in vars(optimizer).items():
        for key, each in value.items() if isinstance(value, dict) else ((name, value),):
            if not (each is None or isinstance(each, (bool, int, float))):
                return None
            marks.append((name, key, type(each), repr(each)))  # which tells 0.0 from -0.0
    return tuple(marks)


def _looked_at(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
    """Take what is logged, so that there are guards for it."""
    for each in (name, value, *args, *kwargs.values()):
        if isinstance(each, (str, int, float)) and each != each:  # noqa: PLR0124
            return


_LATER = Later()


def _told(*args: Any, **kwargs: Any) -> Later:
    """Take what a metric is given, so that there are guards for it."""
    for each in leaves_in([args, kwargs]):
        if isinstance(each, (str, int, float)) and each != each:  # noqa: PLR0124
            break
    return _LATER


def _measured(metric: Any, method: str) -> Callable[..., Later]:
    return _told


class Place:
    """Where a graph finds a tensor that is none of its arguments; it may be another one at the next estimate."""

    def __init__(self, watch: Watch | None, number: int, literal: Tensor | None = None) -> None:
        self._watch, self._number, self._literal = watch, number, literal

    def value(self) -> Tensor:
        """Return the tensor that stands there since the last look."""
        if self._watch is None:
            assert self._literal is not None
            return self._literal
        value: Tensor = self._watch.inputs[self._number].detach()
        return value


def _surroundings(module: nn.Module, functional: FunctionalModule) -> Hashable:
    """Return what decides what is computed that no guard is for."""
    hooks: list[Any] = []
    for child in parts(module):
        for each in (child._forward_hooks, child._forward_pre_hooks):
            if each:
                hooks += [id(child), *each.values()]
    shared = nn.modules.module
    hooks += [*shared._global_forward_hooks.values(), *shared._global_forward_pre_hooks.values()]
    return tuple(hooks), in_place(), functional.autocast_dtype, torch.get_default_dtype()


def drawn_beside_torch(functional: FunctionalModule, before: Any) -> bool:
    """Return whether a generator of NumPy, of ``random`` or of the user's has moved since a snapshot was taken."""
    return bool(before.drawn([*functional.generators, *process_generators()]))
