"""RNNs where graphs are traced: place by place, for mkldnn's fused layer has no forward AD and cannot be traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

NATIVE: dict[str, Any] = {name: getattr(torch._VF, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}

MOST_PLACES = 32
"""Places of a sequence, in all layers and directions, that are written out; compiling so many takes two minutes."""


def lstm(*args: Any) -> Any:
    """Return what ``torch._VF.lstm`` returns."""
    return _recurrent("lstm", *args)


def gru(*args: Any) -> Any:
    """Return what ``torch._VF.gru`` returns."""
    return _recurrent("gru", *args)


def rnn_tanh(*args: Any) -> Any:
    """Return what ``torch._VF.rnn_tanh`` returns."""
    return _recurrent("rnn_tanh", *args)


def rnn_relu(*args: Any) -> Any:
    """Return what ``torch._VF.rnn_relu`` returns."""
    return _recurrent("rnn_relu", *args)


def _recurrent(name: str, *args: Any) -> Any:
    native = NATIVE[name]
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None:
        return native(*args)
    input, _, weights, _, layers, _, _, bidirectional, batch_first = args  # of sequences that are packed, others
    if isinstance(weights, list):
        places = input.shape[1 if batch_first else 0] * layers * (2 if bidirectional else 1)
        if places > MOST_PLACES:
            raise ValueError(f"an RNN of {places} places, each an operation of a graph, would take minutes to compile")
    with without_mkldnn():
        return native(*args)


@contextmanager
def without_mkldnn() -> Iterator[None]:
    """Leave mkldnn's kernels out."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # its ``flags`` context warns about TF32
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before
