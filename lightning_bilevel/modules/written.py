"""Which parameters a loss writes to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_bilevel.errors import MisconfigurationError, combination_error
from lightning_bilevel.modules.swap import Swapper
from lightning_bilevel.stacking import tensors_in
from lightning_bilevel.tree import Params


class Written(TorchDispatchMode):
    """Notes which of some tensors are written to while it is active, and keeps what stood in them before.

    Sees writes in place, also through ``.data``, views and lists of tensors, by the storage that an operation says it
    writes to; and tensors that were given another storage.

    Args:
        tensors: by name; only what is written to is copied.

    >>> weight, other = torch.ones(2), torch.ones(2)
    >>> with Written({"weight": weight, "other": other}) as written:
    ...     weight.data[0].mul_(3)
    tensor(3.)
    >>> written.names()
    ['weight']
    >>> written.undo()
    >>> weight
    tensor([1., 1.])
    """

    def __init__(self, tensors: Params) -> None:
        super().__init__()
        self._tensors = {name: tensor for name, tensor in tensors.items() if type(tensor.detach()) is Tensor}
        self._aliases = {name: tensor.detach() for name, tensor in self._tensors.items()}
        self._before: Params = {}
        self._of_storage: dict[int, list[str]] = {}
        for name, alias in self._aliases.items():
            self._of_storage.setdefault(_storage(alias), []).append(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep what an operation is about to write to."""
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                for tensor in tree_leaves(value):
                    if type(tensor) in (Tensor, nn.Parameter):
                        self._keep(_storage(tensor))
        return func(*args, **kwargs)

    def names(self) -> list[str]:
        """Return the names of what was written to."""
        return [
            name
            for name, tensor in self._tensors.items()
            if name in self._before or _storage(tensor) != _storage(self._aliases[name])
        ]

    def undo(self) -> None:
        """Put back what was written in place; graphs take no notice."""
        with torch.no_grad():
            for name, value in self._before.items():
                self._aliases[name].data.copy_(value)

    def _keep(self, storage: int) -> None:
        for name in self._of_storage.get(storage, ()):
            if name not in self._before:
                self._before[name] = self._aliases[name].clone()


class Standing:
    """Parameters and buffers of a module as they stand, to see without a copy whether any is written to.

    What is written in place through ``.data`` is not seen.

    Args:
        swapper: knows their places.

    >>> module = torch.nn.Linear(1, 1)
    >>> standing = Standing(Swapper(module))
    >>> with torch.no_grad():
    ...     module.bias += 1
    >>> standing.changed()
    ['bias']
    """

    def __init__(self, swapper: Swapper) -> None:
        self._swapper = swapper
        self._marks = [(name, tensor, *_mark(tensor)) for name, tensor in swapper.standing()]

    def changed(self) -> list[str]:
        """Return the names of those that do not stand as they did."""
        now = dict(self._swapper.standing())
        return [
            name
            for name, tensor, version, storage in self._marks
            if now.get(name) is not tensor or _mark(tensor) != (version, storage)
        ]


def _mark(tensor: Tensor) -> tuple[int, int]:
    return 0 if tensor.is_inference() else tensor._version, _storage(tensor)


def versions_of(batch: Any) -> list[int]:
    """Return how often each tensor of a batch was written to in place.

    >>> x = torch.ones(2)
    >>> versions_of((x, x.add_(1)))
    [1, 1]
    """
    if type(batch) in (list, tuple) and all(type(part) is Tensor for part in batch):  # without looking for leaves
        return [part._version for part in batch]
    return [part._version for part in tensors_in(batch) if not part.is_inference()]


def written_to_batch(kind: str) -> MisconfigurationError:
    """Return what to say of a loss that writes to its batch in some evaluations."""
    return combination_error(
        f"a loss of `{kind}` that writes to a tensor of its batch at times only",
        "the first look at the losses has not seen it, so that the next evaluation was given what this one has left",
        "Compute out of place: `x = x + noise` for `x += noise`",
    )


def written_to_level(kind: str, names: str) -> MisconfigurationError:
    """Return what to say of a loss that moves what the levels move."""
    return combination_error(
        f"a loss of `{kind}` that writes to {names}",
        "they are inner or outer parameters: a loss is evaluated many times per training step, on other tensors in "
        "their places",
        "Let the loss compute what it uses from them (`weight.clamp(...)`, `torch.nn.utils.parametrize`), write to "
        "them in `on_train_batch_end`, or leave what the loss itself moves out of both levels",
    )


def written_unseen(kind: str, names: str) -> MisconfigurationError:
    """Return what to say of parameters or buffers that some evaluations of a loss write to."""
    return combination_error(
        f"a loss of `{kind}` that writes to {names} at times only",
        "the first look at the losses has not seen it, so that it has not gone along with the inner run",
        "Write to it in every evaluation, if only what is there, or in `on_train_batch_end`",
    )


def _storage(tensor: Tensor) -> int:
    """Return what names a storage; tensors of other kinds may have none."""
    return tensor.untyped_storage()._cdata if type(tensor) in (Tensor, nn.Parameter) else 0
