"""What a loss returned beside its value, for the hooks that read a training step's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from lightning_bilevel.host import apply_to_collection
from lightning_bilevel.modules.attributes import plain


class Stacked(NamedTuple):
    """A tensor of several episodes, its first dimension, out of function transforms."""

    tensor: Tensor


def beside_loss(result: Any) -> dict[str, Any]:
    """Return the entries of what a loss returned but for ``"loss"``.

    >>> beside_loss({"loss": 1.0, "logits": 2.0}), beside_loss(1.0)
    ({'logits': 2.0}, {})
    """
    return {key: value for key, value in result.items() if key != "loss"} if isinstance(result, Mapping) else {}


def by_episode(outputs: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return the outputs of each of ``count`` episodes, out of function transforms and off their graphs.

    Args:
        outputs: of one episode, or of several that were vectorized; tensors, :class:`Stacked` or within the
            transforms, may be anywhere in containers.
        count: episodes.
    """
    takes = [_all] if count == 1 else [partial(_one, number) for number in range(count)]
    return [
        {key: apply_to_collection(value, (Tensor, Stacked), take) for key, value in outputs.items()} for take in takes
    ]


def together(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one mapping: of one episode its own, of several a list at each key, whatever shapes they have.

    >>> together([{"logits": 1.0}]), together([{"logits": 1.0}, {"logits": 2.0}])
    ({'logits': 1.0}, {'logits': [1.0, 2.0]})
    """
    if len(episodes) == 1:
        return dict(episodes[0])
    keys = dict.fromkeys(key for outputs in episodes for key in outputs)
    return {key: [outputs.get(key) for outputs in episodes] for key in keys}


def _all(tensor: Tensor | Stacked) -> Tensor:
    value: Tensor = plain(tensor.tensor if isinstance(tensor, Stacked) else tensor)
    return value


def _one(number: int, tensor: Tensor | Stacked) -> Tensor:
    value = _all(tensor)
    if isinstance(tensor, Stacked):
        return value[number]
    return value[number] if value.ndim > tensor.ndim else value  # the same for all, where it was not vectorized
