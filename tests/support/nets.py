"""Nets with operations that PyTorch differentiates twice, or forward, only with care."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_bilevel import SGD, Episode, ForwardGradient, HypergradientStrategy, ReverseUnroll
from tests.support.problems import Problem, draw, generator
from tests.support.seeds import forked

EXAMPLES = 4
VOCABULARY = 40


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Checkpointed(nn.Sequential):
    """Recomputes its activations in the user's own code."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Gpt2(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        size = {"vocab_size": VOCABULARY, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
        self.model = GPT2LMHeadModel(GPT2Config(**size, **rates, use_cache=False, bos_token_id=0, eos_token_id=0))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.0, activation="gelu", batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2))


def dense(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), *layers, nn.Tanh(), nn.Linear(3, 2))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)
        return dense(nn.utils.weight_norm(nn.Linear(3, 3)))


def weighted_squares(out: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return (weights * (out - y).square().mean(1)).mean()


def weighted_tokens(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return (weights * losses.mean(1)).mean()


class Case(NamedTuple):
    """A net, the shape of an input, and its loss.

    Attributes:
        build: makes the net.
        shape: of one input; of token numbers below ``VOCABULARY`` if ``tokens``.
        loss: of outputs, targets and weights of the examples.
        forward: whether PyTorch has forward AD for all of its operations.
        differences: whether the plain loop depends on φ through its parameters only: statistics that are
            estimated along the way, and that later steps use, are constants to every hypergradient.
        training: the module's mode.
        tokens: whether inputs are token numbers.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2,)
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = weighted_squares
    forward: bool = True
    differences: bool = True
    training: bool = True
    tokens: bool = False


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))


GPT2 = Case(lambda: Gpt2(0.0), (5,), weighted_tokens, tokens=True)
CASES: dict[str, Case] = {
    "Conv2d, BatchNorm2d": Case(convolutions, (1, 4, 4)),
    "Conv2d, BatchNorm2d, eval": Case(convolutions, (1, 4, 4), training=False),
    "BatchNorm1d": Case(lambda: dense(nn.BatchNorm1d(3))),
    "LSTM": Case(lambda: Recurrent(nn.LSTM), (3, 2)),
    "GRU": Case(lambda: Recurrent(nn.GRU), (3, 2)),
    "TransformerEncoderLayer": Case(encoder, (3, 4)),
    "TransformerEncoderLayer, eval": Case(encoder, (3, 4), training=False),
    "GPT-2": GPT2,
    "GPT-2, dropout": GPT2._replace(build=lambda: Gpt2(0.2)),
    "Dropout": Case(lambda: dense(nn.Dropout(0.4))),
    "weight_norm of all": Case(lambda: dense(parametrizations.weight_norm(nn.Linear(3, 3), dim=None))),
    "weight_norm": Case(lambda: dense(parametrizations.weight_norm(nn.Linear(3, 3)))),
    "weight_norm, old": Case(old_weight_norm),
    "spectral_norm": Case(
        lambda: dense(parametrizations.spectral_norm(nn.Linear(3, 3))), forward=False, differences=False
    ),
    "spectral_norm, eval": Case(lambda: dense(parametrizations.spectral_norm(nn.Linear(3, 3))), training=False),
    "spectral_norm, old": Case(
        lambda: dense(nn.utils.spectral_norm(nn.Linear(3, 3))), forward=False, differences=False
    ),
    "Embedding": Case(
        lambda: nn.Sequential(nn.Embedding(VOCABULARY, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)), (3,), tokens=True
    ),
    "mse_loss": Case(dense, loss=lambda out, y, weights: F.mse_loss(weights[:, None] * out, y)),
    "huber_loss": Case(dense, loss=lambda out, y, weights: F.huber_loss(weights[:, None] * out, y, delta=0.7)),
    "checkpoint": Case(lambda: Checkpointed(*dense()), forward=False),
}
FORWARD = {name: case for name, case in CASES.items() if case.forward}
DIFFERENCES = {name: case for name, case in CASES.items() if case.differences}
STATISTICS = [name for name in CASES if "BatchNorm" in name or "spectral" in name]

every_net = pytest.mark.parametrize("name", CASES)


class Weighted(Problem):
    """Weights of the examples and the learning rate of momentum SGD are the outer parameters."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(inner_steps=3, inner_start="reset", episode_chunk_size=1)
        case = CASES[name]
        self.name, self.loss = name, case.loss
        with forked(0):
            self.net = case.build().to(dtype)
        self.train(case.training)
        self.example_weights = nn.Parameter(draw(EXAMPLES, seed=1).to(dtype))
        self.log_lr = nn.Parameter(torch.tensor(-1.0, dtype=dtype))

    def copy(self):  # old-style norms keep a tensor that cannot be deep-copied
        fresh = Weighted(self.name, self.log_lr.dtype)
        fresh.load_state_dict(self.state_dict())
        return fresh

    def inner_parameters(self):
        return list(self.net.parameters())

    def inner_loss(self, batch):
        x, y = batch
        return self.loss(self.net(x), y, self.example_weights.sigmoid())

    def outer_loss(self, batch):
        x, y = batch
        return self.loss(self.net(x), y, torch.ones_like(self.example_weights))

    def configure_inner_optimizer(self):
        return SGD(lr=self.log_lr.exp(), momentum=0.5)

    def torch_optimizer(self):
        return torch.optim.SGD(self.net.parameters(), lr=self.log_lr.exp().item(), momentum=0.5)


def data(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Episode:
    case = CASES[name]

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        if case.tokens:
            tokens = torch.randint(VOCABULARY, (EXAMPLES, *case.shape), generator=generator(seed))
            return tokens, tokens if case.loss is weighted_tokens else draw(EXAMPLES, 2, seed=seed).to(dtype)
        return draw(EXAMPLES, *case.shape, seed=seed).to(dtype), draw(EXAMPLES, 2, seed=seed + 1).to(dtype)

    return Episode([batch(100 * seed), batch(100 * seed + 2)], batch(100 * seed + 4))


STRATEGIES: dict[str, HypergradientStrategy] = {
    "ReverseUnroll": ReverseUnroll(),
    "checkpointed": ReverseUnroll(checkpoint=1),
    "chunks": ForwardGradient(3, chunk_size=1),
    "forward": ForwardGradient(3, chunk_size=2, mode="forward"),
}
