"""RNNs are PyTorch's own but where they are traced, and there they are the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_bilevel.kernels.recurrent import MOST_PLACES, NATIVE
from lightning_bilevel.kernels.safe import differentiable_kernels

KINDS = {
    "lstm": lambda: nn.LSTM(2, 3),
    "gru": lambda: nn.GRU(2, 3, num_layers=2, bidirectional=True),
    "rnn_tanh": lambda: nn.RNN(2, 3),
    "rnn_relu": lambda: nn.RNN(2, 3, nonlinearity="relu", batch_first=True),
}


@pytest.mark.parametrize("name", NATIVE)
def test_what_is_traced_is_the_same(name: str) -> None:
    rnn, x = KINDS[name](), torch.randn(4, 3, 2)
    with differentiable_kernels(rnn):
        graph = make_fx(lambda x: rnn(x)[0], tracing_mode="fake", _allow_non_fake_inputs=True)(x)
        here = rnn(x)[0]
    assert torch.backends.mkldnn.enabled
    assert not [node for node in graph.graph.nodes if "mkldnn" in str(node.target)]
    torch.testing.assert_close(graph(x), rnn(x)[0])
    torch.testing.assert_close(here, rnn(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("batch_first", [False, True])
def test_what_is_long_is_not_written_out(batch_first: bool) -> None:
    rnn = nn.GRU(2, 3, num_layers=2, batch_first=batch_first)
    shape = (1, MOST_PLACES, 2) if batch_first else (MOST_PLACES, 1, 2)
    with differentiable_kernels(rnn), pytest.raises(ValueError, match=f"an RNN of {2 * MOST_PLACES} places"):
        make_fx(lambda x: rnn(x)[0], tracing_mode="fake", _allow_non_fake_inputs=True)(torch.randn(shape))


def test_sequences_that_are_packed_are_pytorchs_own() -> None:
    rnn = nn.LSTM(2, 3)
    packed = nn.utils.rnn.pack_sequence([torch.randn(2, 2), torch.randn(1, 2)])
    expected, _ = rnn(packed)
    with differentiable_kernels(rnn):
        found, _ = rnn(packed)
    assert torch.equal(found.data, expected.data)
