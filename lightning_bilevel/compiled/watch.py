"""When graphs that were traced before are still what the user's Python would do: Dynamo's guards decide.

A trace writes down what one run did and looks at nothing later. So the same Python goes through Dynamo too, whose graph
is thrown away: its guards are asked before each run of inner steps (some 15 µs), and what it cannot follow is not
compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bilevel.compiled.reasons import NotCompiled, reason
from lightning_bilevel.generators import process_generators
from lightning_bilevel.kernels.safe import in_place
from lightning_bilevel.modules.attributes import Attributes, Snapshot
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.modules.returned import scalar
from lightning_bilevel.problem import Batch
from lightning_bilevel.stacking import tensors_in

MOST_STATES = 4
"""Different things that a loss or an update may do before it is left to eager; each takes seconds to compile."""


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
        self._module, self._states = module, 0
        self._attributes: tuple[Attributes, Snapshot] | None = None
        code = function.__code__.replace(co_name=f"watched_{id(self)}")  # Dynamo's limit of states is for each code
        copy = FunctionType(code, function.__globals__, closure=function.__closure__)
        self._function = torch.compile(copy, backend=self._backend, fullgraph=True, dynamic=False)

    def look(self, *args: Any) -> int:
        """Return the state.

        Raises:
            NotCompiled: Dynamo cannot follow, there have been too many states, or it writes to attributes.
        """
        self._forget()
        try:
            with torch.no_grad():
                self._function(*args)
        except Exception as error:  # Dynamo's, of many kinds, and the user's
            raise NotCompiled(reason(error)) from error
        if not self.state:
            raise NotCompiled("`torch.compile` is switched off")
        if self._attributes is not None:  # a new state: what Python does besides is done by now
            attributes, before = self._attributes
            if attributes.put(before):
                raise NotCompiled("it writes to an attribute of the module")
        return self.state

    def _forget(self) -> None:
        self.state, self.inputs, self._attributes = 0, (), None

    def _backend(self, graph: Any, examples: Any) -> Any:
        if len(list(graph.graph.nodes)[-1].args[0]) != 1:  # the others are what it writes to the module, or logs
            raise NotCompiled("it leaves tensors behind besides its value: an attribute, a log, a metric")
        if self._states == MOST_STATES:
            raise NotCompiled(f"it has done {MOST_STATES} different things so far, by an attribute that changes, say")
        attributes = Attributes(self._module)
        self._attributes = attributes, attributes.take()
        self._states += 1
        number, nothing = self._states, [torch.empty(())]

        def remember(*args: Any) -> list[Tensor]:
            self.state, self.inputs = number, args
            return nothing

        return remember


class Watchman:
    """Watches the inner loss of a module on batches of one kind, and the inner optimizer's update.

    Args:
        functional: the module.
        batch: an example of one episode: tensors of the right shapes, whatever their numbers, and all else as it is;
            it is kept.
    """

    def __init__(self, functional: FunctionalModule, batch: Batch) -> None:
        module = functional.module

        def loss(batch: Batch) -> Tensor:  # with the module's own parameters: guards do not look at values
            return scalar(module, "inner_loss", module.inner_loss(batch))

        def update(theta: Any, converted: Any, number: int) -> Tensor:
            optimizer: Any = module.configure_inner_optimizer() if converted is None else converted
            after, opt_state = optimizer.update(theta, theta, optimizer.init(theta), number)
            values = [*after.values(), *(value for values in opt_state.values() for value in values.values())]
            return torch.stack([value.real.sum() for value in values]).sum()

        self._module, self._batch, self._update = module, batch, update
        self._loss = Watch(loss, module)
        self._updates: dict[int, Watch] = {}
        self._theta = functional.theta()
        self.examples = {id(value) for value in (*tensors_in(batch), *self._theta.values())}

    def look(self, functional: FunctionalModule) -> Hashable:
        """Return what tells the present of the inner loss, and of all around, from other times.

        Args:
            functional: the module, whose session is entered.

        Raises:
            NotCompiled: Dynamo cannot follow.
        """
        with functional.recorder.apart(_looked_at), functional.in_place({}):  # under the user's autocast
            return self._loss.look(self._batch), _surroundings(self._module, functional)

    def look_at_update(self, functional: FunctionalModule, number: int) -> int:
        """Return what tells the present of an update from other times, like :meth:`look`.

        Args:
            functional: the module.
            number: of the update, from 1.
        """
        if number not in self._updates:
            self._updates[number] = Watch(self._update, self._module)
        return self._updates[number].look(self._theta, functional.converted(), number)

    def places(
        self,
        read: Sequence[Tensor],
        literal: Sequence[bool],
        functional: FunctionalModule,
        buffers: Sequence[str],
        numbers: Collection[int],
        outer: OuterWatch | None = None,
    ) -> list[Place]:
        """Return where tensors that a graph reads besides its arguments stand among those that the watch saw.

        Args:
            read: the tensors.
            literal: which of these are written in the code.
            functional: the module.
            buffers: names of those that are arguments.
            numbers: of the updates in the graph.
            outer: sees what the outer loss reads, where that is in the graph.

        Raises:
            NotCompiled: one is not among them; or what the losses read is not among these, so that its numbers have
                become a part of the graph.
        """
        watches = [self._loss, *(self._updates[number] for number in numbers)]
        examples = set(self.examples)
        if outer is not None:
            watches.append(outer.watch)
            examples |= outer.examples
        seen = {id(value): Place(watch, n) for watch in watches for n, value in enumerate(watch.inputs)}
        levels, current = functional.levels, functional.swapper.current
        used = {id(current(name)) for name in (*levels.inner, *levels.outer, *buffers)} | examples
        found: list[Place] = []
        for value, plain in zip(read, literal, strict=True):
            if not plain and id(value) not in seen:
                raise NotCompiled(f"it reads a tensor of shape {tuple(value.shape)} that cannot be followed")
            used.add(id(value))
            found.append(Place(None, 0, value) if plain else seen[id(value)])
        for value in (value for watch in watches for value in watch.inputs if id(value) not in used):
            raise NotCompiled(f"it takes numbers out of an array or a tensor of shape {tuple(value.shape)}")
        return found


class OuterWatch:
    """Watches the outer loss of a module on batches of one kind.

    Args:
        functional: the module.
        batch: an example of one episode, see :class:`Watchman`.

    Attributes:
        watch: what watches it.
        examples: ids of the tensors that it is watched on.
    """

    def __init__(self, functional: FunctionalModule, batch: Batch) -> None:
        module = functional.module

        def loss(batch: Batch) -> Tensor:
            return scalar(module, "outer_loss", module.outer_loss(batch))

        self.watch, self._batch = Watch(loss, module), batch
        self.examples = {id(value) for value in tensors_in(batch)}

    def look(self, functional: FunctionalModule) -> int:
        """Return what tells the present of the outer loss from other times.

        Raises:
            NotCompiled: Dynamo cannot follow.
        """
        with functional.recorder.apart(_looked_at), functional.in_place({}):
            return self.watch.look(self._batch)


def _looked_at(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
    """Take what is logged, so that there are guards for it."""
    for each in (name, value, *args, *kwargs.values()):
        if isinstance(each, (str, int, float)) and each != each:  # noqa: PLR0124
            return


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
    for child in module.modules():
        for each in (child._forward_hooks, child._forward_pre_hooks):
            if each:
                hooks += [id(child), *each.values()]
    shared = nn.modules.module
    hooks += [*shared._global_forward_hooks.values(), *shared._global_forward_pre_hooks.values()]
    return tuple(hooks), in_place(), functional.autocast_dtype, torch.get_default_dtype()


def drawn_beside_torch(functional: FunctionalModule, before: Any) -> bool:
    """Return whether a generator of NumPy, of ``random`` or of the user's has moved since a snapshot was taken."""
    return bool(before.drawn([*functional.generators, *process_generators()]))
