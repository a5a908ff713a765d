"""RNNs by graphs: those of all kinds agree with eager, and what is left to it says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bilevel import (
    ForwardGradient,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    ZerothOrder,
)
from lightning_bilevel.compiled.recurrent import Recurrent
from lightning_bilevel.linear_solvers import Neumann
from lightning_bilevel.problem import Episode
from tests.support.compiled import CLASSES, FEATURES, apart, both, episode, needs_inductor, weighted
from tests.support.modules import Maml

PLACES, HIDDEN = 2, 5


class Last(nn.Module):
    """An RNN with a head on what it returns last."""

    def __init__(self, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(FEATURES, HIDDEN, batch_first=True, **options)
        width = (options.get("proj_size") or HIDDEN) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Started(Last):
    """One with a state to start from that is learned, and a head on the state that it ends with."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM)
        self.start = nn.Parameter(torch.randn(1, 1, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        start = self.start.expand(1, len(x), HIDDEN).contiguous()
        _, (hidden, cell) = self.rnn(x, (start, start.tanh()))
        return self.head(hidden[0] + cell[0])


class Cell(nn.Module):
    """A cell that is called for each place."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = kind(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for place in x.unbind(1):
            state = self.cell(place, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Packed(Last):
    """Sequences of other lengths, packed."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 2, 2, 2, 1, 1]), batch_first=True)
        return self.head(self.rnn(packed)[1][0][0])


NETS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Last(nn.LSTM),
    "GRU": lambda: Last(nn.GRU),
    "RNN": lambda: Last(nn.RNN),
    "RNN with ReLU": lambda: Last(nn.RNN, nonlinearity="relu"),
    "masked layers": lambda: Last(nn.LSTM, num_layers=2, dropout=0.5, bidirectional=True),
    "masked layers of a GRU": lambda: Last(nn.GRU, num_layers=2, dropout=0.5),
    "a projection": lambda: Last(nn.LSTM, proj_size=2),
    "no biases": lambda: Last(nn.LSTM, bias=False),
    "a start": Started,
    "LSTMCell": lambda: Cell(nn.LSTMCell),
    "GRUCell": lambda: Cell(nn.GRUCell),
    "RNNCell": lambda: Cell(nn.RNNCell),
}
STRATEGIES: dict[str, Callable[[], HypergradientStrategy]] = {
    "reverse": ReverseUnroll,
    "tangents": lambda: ForwardGradient(2),
    "forward mode": lambda: ForwardGradient(2, mode="forward"),
    "products": lambda: ImplicitGradient(Neumann(3, step_size=0.1)),
    "one copy after another": lambda: ZerothOrder(2, mu=0.1, chunk_size=1),  # RNNs cannot be vectorized
}
FAST = {("LSTM", "reverse"), ("GRU", "reverse"), ("RNN", "tangents"), ("LSTM", "products")}
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize(
    ("net", "strategy"),
    [
        pytest.param(net, strategy, marks=() if (net, strategy) in FAST else pytest.mark.slow)
        for net in NETS
        for strategy in STRATEGIES
    ],
)
def test_agrees_with_eager(net: str, strategy: str, calls: list[int]) -> None:
    module = weighted(net=NETS[net], inner_steps=2)
    module.log_lr.requires_grad_(False)
    for turn in range(2):
        assert apart(*both(module, STRATEGIES[strategy](), episode(turn, features=(PLACES, FEATURES)))) < 2e-6
    assert calls


def test_weights_that_change_are_seen_and_the_lists_are_put_back(calls: list[int]) -> None:
    module, given = weighted(net=NETS["LSTM"], inner_steps=1), episode(features=(PLACES, FEATURES))
    for _ in range(3):
        assert apart(*both(module, episodes=given)) < 2e-6
        with torch.no_grad():
            for weight in module.net.parameters():
                weight.mul_(1.1)
    assert len(calls) == 4  # of one state
    assert all(a is b for a, b in zip(module.net.rnn._flat_weights, module.net.rnn.parameters(), strict=True))


def test_an_rnn_that_both_levels_share(calls: list[int]) -> None:
    torch.manual_seed(0)
    module = Maml(NETS["LSTM"](), F.cross_entropy, compile=True, episode_chunk_size=1, inner_steps=1)
    episodes = [Episode([e.inner[0][:2]], e.outer[:2]) for e in (episode(n, (PLACES, FEATURES)) for n in range(2))]
    assert apart(*both(module, episodes=episodes)) < 2e-6
    assert calls


def test_other_weights_in_their_places_make_other_lists() -> None:
    rnn = nn.LSTM(2, 3)
    recurrent = Recurrent(rnn)
    for _ in range(2):
        before = rnn._flat_weights = [weight.detach() for weight in rnn.parameters()]
        with recurrent.followed():
            first = rnn._flat_weights
            assert all(a is b for a, b in zip(first, rnn.parameters(), strict=True))
        assert rnn._flat_weights is before
        with recurrent.followed():
            assert rnn._flat_weights is first
        rnn.weight_hh_l0 = nn.Parameter(torch.zeros(12, 3))


def test_sequences_that_are_packed_are_eager(calls: list[int]) -> None:
    module, given = weighted(net=Packed), episode(features=(PLACES, FEATURES))
    with pytest.warns(UserWarning, match="The inner steps are not compiled: Attempted to call function marked as skip"):
        assert apart(*both(module, episodes=given)) == 0
    assert not calls


def test_long_sequences_are_eager(calls: list[int]) -> None:
    module, given = weighted(net=lambda: Last(nn.GRU, bidirectional=True)), episode(features=(20, FEATURES))
    with pytest.warns(UserWarning, match="The inner steps are not compiled: an RNN of 40 places, each an operation"):
        assert apart(*both(module, episodes=given)) == 0
    assert not calls


@pytest.mark.slow
@needs_inductor
@pytest.mark.usefixtures("by_inductor")
def test_inductor(calls: list[int]) -> None:
    module = weighted(net=NETS["masked layers of a GRU"], inner_steps=1)
    assert apart(*both(module, episodes=episode(features=(PLACES, FEATURES)))) < 1e-5
    assert calls


def test_without_rnns_nothing_is_done() -> None:
    with Recurrent(nn.Linear(1, 1)).followed():
        assert not torch._dynamo.config.allow_rnn
    with Recurrent(nn.GRU(1, 1)).followed():
        assert torch._dynamo.config.allow_rnn
