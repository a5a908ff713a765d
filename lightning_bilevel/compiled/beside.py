"""What an outer loss returns beside its value: tensors that a graph returns too, in what else it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.modules.attributes import plain
from lightning_bilevel.modules.outputs import Stacked
from lightning_bilevel.stacking import flattened, leaves_in, replaced, tensors_in

_NOTHING = torch.empty(0)


class Beside(NamedTuple):
    """What an outer loss returns beside its value, without its tensors.

    Attributes:
        form: containers, numbers and texts, which hold as long as the graph does, with empty tensors.
        stacked: of each tensor, whether it has one for each episode, or copy of the outer parameters, of a stack.
    """

    form: Mapping[str, Any] = {}  # noqa: RUF012  # nobody writes to it
    stacked: Sequence[bool] = ()

    @property
    def size(self) -> int:
        """How many tensors there are."""
        return len(self.stacked)

    def filled(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Return what the loss would have returned, with these tensors."""
        pairs = zip(tensors, self.stacked, strict=True)
        values: Iterator[Any] = iter([Stacked(tensor) if stacked else tensor for tensor, stacked in pairs])
        found: dict[str, Any] = replaced(dict(self.form), lambda _: next(values))
        return found


def without_tensors(value: Any, what: str) -> tuple[Any, list[Tensor]]:
    """Return something with empty tensors in the places of its tensors, and these.

    Args:
        value: within a loss that is traced, or what one has returned.
        what: is done with it, for the error.

    Raises:
        NotCompiled: something in it is no tensor, number or text, and may be another thing next time.
    """
    tensors = list(tensors_in(value))
    form = replaced(value, lambda _: _NOTHING)
    kinds = {type(plain(tensor)) if tensor.layout is torch.strided else None for tensor in tensors}
    if flattened(form).rest is None or not kinds <= {Tensor, nn.Parameter, FakeTensor}:
        raise NotCompiled(f"{what} something that is no tensor, number or text in containers")
    return form, tensors


def taken_apart(beside: Mapping[str, Any]) -> tuple[Beside, list[Tensor]]:
    """Take what a loss returned beside its value apart, where it is traced.

    Args:
        beside: the tensors in it may be within function transforms.

    Returns:
        What it is, and its tensors, off their graphs.

    Raises:
        NotCompiled: something in it is no tensor, number or text, and may be another thing next time.

    >>> beside, tensors = taken_apart({"logits": torch.ones(2), "names": ["a", "b"]})
    >>> beside.size, beside.filled([2 * tensor for tensor in tensors])
    (1, {'logits': tensor([2., 2.]), 'names': ['a', 'b']})
    """
    form, found = without_tensors(dict(beside), "it returns beside its value")
    tensors = [plain(tensor) for tensor in found]
    return Beside(form, [a.ndim > b.ndim for a, b in zip(tensors, found, strict=True)]), tensors


def looked_at(value: Tensor, beside: Mapping[str, Any]) -> Tensor:
    """Return a loss that depends on what is returned beside it, so that guards are for all of that, too.

    >>> looked_at(torch.tensor(1.0), {"logits": torch.ones(2), "names": ["a", "b"]})
    tensor(3.)
    """
    for leaf in leaves_in(list(beside.values())):
        if isinstance(leaf, Tensor):
            value = value + leaf.detach().sum()
        elif isinstance(leaf, (str, int, float)) and leaf != leaf:  # noqa: PLR0124
            break
    return value
