"""RNNs under the watch: Dynamo leaves them out unless it is told to follow, and they keep a list of their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_bilevel.modules.parts import parts


class Recurrent:
    """The RNNs of a module.

    Each keeps a list of the tensors that stood in the places of its weights when it was last called. Losses are
    watched with the module's own parameters, so that the list has to be of these.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._children = [child for child in parts(module) if isinstance(child, nn.RNNBase)]
        self._lists: list[dict[str, Any]] = [{} for _ in self._children]

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Let Dynamo follow the RNNs, with their own weights in their lists, the same list at each call."""
        if not self._children:
            yield
            return
        before = [_lists(child) for child in self._children]
        for child, own in zip(self._children, self._lists, strict=True):
            vars(child).update(own)
            if not own or child._weights_have_changed():
                child._init_flat_weights()
                own.update(_lists(child))
        try:
            with torch._dynamo.config.patch(allow_rnn=True):
                yield
        finally:
            for child, lists in zip(self._children, before, strict=True):
                vars(child).update(lists)


def _lists(child: nn.Module) -> dict[str, Any]:
    return {name: vars(child)[name] for name in ("_flat_weights", "_flat_weight_refs")}
