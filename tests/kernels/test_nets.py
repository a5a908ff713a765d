"""Nets with operations that PyTorch differentiates twice, or forward, only with care.

On each, every engine gives one hypergradient: a plain unroll, a checkpointed one, double-backward tangents, forward AD
where PyTorch has it, and differences of a loop in plain PyTorch.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_bilevel import (
    SGD,
    Episode,
    ForwardGradient,
    ForwardUnroll,
    Hypergradient,
    HypergradientStrategy,
    ReverseUnroll,
    TruncatedReverse,
    hypergradient,
    tree,
)
from lightning_bilevel.directions import Gaussian, Key
from lightning_bilevel.kernels.safe import Randomness
from lightning_bilevel.tree import Params
from tests.support.problems import (
    Problem,
    assert_close,
    directional_difference,
    draw,
    generator,
    plain_value,
    seeded,
    train,
)

EXAMPLES = 4
VOCABULARY = 40

# --- The nets ---


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
    "mse_loss": Case(dense, loss=lambda out, y, weights: F.mse_loss(weights[:, None] * out, y), forward=False),
    "huber_loss": Case(
        dense, loss=lambda out, y, weights: F.huber_loss(weights[:, None] * out, y, delta=0.7), forward=False
    ),
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
        with seeded(0):
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


@cache
def problem(name: str) -> tuple[Weighted, Episode, Hypergradient]:
    """Return a module, an episode and the hypergradient that a plain unroll gives."""
    module, episode = Weighted(name), data(name)
    return module, episode, hypergradient(module, ReverseUnroll(), episode)


# --- One hypergradient ---


@pytest.mark.parametrize("name", DIFFERENCES)
def test_plain_unroll_equals_differences_of_a_plain_loop(name: str) -> None:
    module, episode, result = problem(name)
    for seed in (1, 2):
        v = {key: draw(*grad.shape, seed=seed) for key, grad in result.grads.items()}
        with sdpa_kernel(SDPBackend.MATH):  # other kernels draw other masks
            expected = directional_difference(module, episode, v)
        assert tree.dot(result.grads, v).item() == pytest.approx(expected, rel=1e-6)


@every_net
def test_value_and_state_are_those_of_a_plain_loop(name: str) -> None:
    module, episode, result = problem(name)
    with sdpa_kernel(SDPBackend.MATH), seeded(Key().masks):
        trained = train(module, episode)
    assert_close(result.state.params, tree.detach(trained.inner_named()))
    with sdpa_kernel(SDPBackend.MATH):
        assert result.value.item() == pytest.approx(plain_value(module, episode), rel=1e-9)


@pytest.mark.parametrize("every", [1, 2])
@every_net
def test_checkpointed_unroll(name: str, every: int) -> None:
    check_equal(name, ReverseUnroll(checkpoint=every), problem(name)[2].grads)


@every_net
def test_truncation_after_the_last_step(name: str) -> None:
    check_equal(name, TruncatedReverse(steps=3), problem(name)[2].grads)


@pytest.mark.parametrize("chunk_size", [None, 1])
@every_net
def test_double_backward_tangents(name: str, chunk_size: int | None) -> None:
    check_equal(name, ForwardGradient(2, Gaussian(), chunk_size, mode="double_backward"), contracted(name))


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("name", FORWARD)
def test_forward_tangents(name: str, chunk_size: int | None) -> None:
    check_equal(name, ForwardGradient(2, Gaussian(), chunk_size, mode="forward"), contracted(name))


@pytest.mark.parametrize("name", ["Dropout", "GPT-2, dropout"])
def test_masks_are_replayed_along_every_coordinate(name: str) -> None:
    check_equal(name, ForwardUnroll(chunk_size=2), problem(name)[2].grads)
    module, episode, result = problem(name)
    other = hypergradient(module, ReverseUnroll(), episode, seed=1)
    assert (other.value - result.value).abs() > 1e-6


def contracted(name: str) -> Params:
    """Return ½ Σ ⟨∇h, v_i⟩ v_i for the two directions that the estimates below draw."""
    grads = problem(name)[2].grads
    v = Gaussian().draw(Key(seed=0), 0, 2, grads)
    return tree.combine(tree.inner_products(v, grads) / 2, v)


def check_equal(name: str, strategy: HypergradientStrategy, expected: Params) -> None:
    module, episode, reference = problem(name)
    result = hypergradient(module, strategy, episode)
    assert_close(result.grads, expected, 1e-8)
    torch.testing.assert_close(result.value, reference.value)
    assert_close(result.state.params, reference.state.params)
    torch.testing.assert_close(result.state.buffers, reference.state.buffers)


# --- Statistics ---

STRATEGIES: dict[str, HypergradientStrategy] = {
    "ReverseUnroll": ReverseUnroll(),
    "checkpointed": ReverseUnroll(checkpoint=1),
    "chunks": ForwardGradient(3, chunk_size=1),
    "forward": ForwardGradient(3, chunk_size=2, mode="forward"),
}


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_move_as_in_plain_training(name: str, kind: str) -> None:
    strategy = STRATEGIES[kind if CASES[name].forward or kind != "forward" else "chunks"]
    module, episode = Weighted(name), data(name)
    before = {key: buffer.clone() for key, buffer in module.named_buffers()}
    result = hypergradient(module, strategy, episode)
    after = dict(train(module, episode).named_buffers())
    assert any(not torch.equal(before[key], after[key]) for key in before) == CASES[name].training
    moved = {**before, **result.state.buffers}
    torch.testing.assert_close(moved, after, rtol=1e-9, atol=1e-9)
    changed = [key for key, buffer in module.named_buffers() if not torch.equal(buffer, before[key])]
    assert changed == []


def test_statistics_of_stacked_episodes_are_their_own() -> None:
    name = "BatchNorm1d"
    module, several = Weighted(name), [data(name, seed) for seed in range(3)]
    module.episode_chunk_size = None
    result = hypergradient(module, ReverseUnroll(), several)
    expected = [dict(train(module, episode).named_buffers()) for episode in several]
    stacked = {key: torch.stack([buffers[key] for buffers in expected]) for key in expected[0]}
    torch.testing.assert_close(result.state.buffers, stacked)


# --- Kernels are chosen, and put back ---


def kernels() -> dict[str, Any]:
    return {
        "fast attention": torch.backends.mha.get_fastpath_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "cudnn": torch.backends.cudnn.enabled,
        "weight norm": torch._weight_norm,
        "batch norm": torch.batch_norm,
        "instance norm": torch.instance_norm,
        "linear": torch.nn.functional.linear,
        "convolutions": [getattr(torch.nn.functional, f"conv{d}d") for d in (1, 2, 3)],
    }


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_kernels_are_put_back(strategy: HypergradientStrategy) -> None:
    class Spy(Weighted):
        seen: dict[str, Any] = {}  # noqa: RUF012

        def outer_loss(self, batch):
            self.seen.update(kernels())
            if self.net[0].weight.isnan().any():
                raise ArithmeticError("nan")
            return super().outer_loss(batch)

    before, module, episode = kernels(), Spy("weight_norm"), data("weight_norm")
    hypergradient(module, strategy, episode)
    assert kernels() == before
    assert not module.seen["flash"]
    assert not module.seen["fast attention"]
    # Where losses are differentiated once, PyTorch's own take less time.
    for kind in ("batch norm", "convolutions"):
        assert (module.seen[kind] != before[kind]) == strategy.second_order
    with torch.no_grad():
        module.net[0].weight.fill_(torch.nan)
    with pytest.raises(ArithmeticError, match="^nan"):
        hypergradient(module, strategy, episode)
    assert kernels() == before


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_generators_of_accelerators(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are drawn on the device: what runs again needs its generator, too; the one of Apple's has no index."""
    device, there = torch.device(kind), torch.Generator()
    expected = () if kind == "mps" else (device,)

    def get(*where: torch.device) -> Tensor:
        assert where == expected
        return there.get_state()

    def put(state: Tensor, *where: torch.device) -> None:
        assert where == expected
        there.set_state(state)

    monkeypatch.setattr(getattr(torch, kind), "get_rng_state", get)
    monkeypatch.setattr(getattr(torch, kind), "set_rng_state", put)
    randomness = Randomness(device)
    with randomness.preserved():
        first = torch.rand(3, generator=there)
    again = torch.rand(3, generator=there)
    randomness.restore()
    assert torch.equal(first, again)
    assert torch.equal(first, torch.rand(3, generator=there))


def test_threads_take_turns() -> None:
    """Kernels and random generators are those of the process, so that two estimates at once would spoil each other."""
    episode, results = data("weight_norm"), []

    def estimated() -> None:
        results.append(hypergradient(Weighted("weight_norm"), ReverseUnroll(), episode).grads)

    class Impatient(Weighted):
        other: threading.Thread | None = None

        def outer_loss(self, batch):
            if self.other is None:
                self.other = threading.Thread(target=estimated)
                self.other.start()
                self.other.join(timeout=1.0)
                assert not results
            return super().outer_loss(batch)

    module = Impatient("weight_norm")
    mine = hypergradient(module, ReverseUnroll(), episode).grads
    module.other.join()
    assert_close(results[0], mine, 0)


@pytest.mark.parametrize("mode", ["double_backward", "forward"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_recurrent_nets_in_single_precision(name: str, mode: Any) -> None:
    module, episode = Weighted(name, torch.float32), data(name, dtype=torch.float32)
    grads = hypergradient(module, ForwardUnroll(mode=mode), episode).grads
    assert_close(tree.map(Tensor.double, grads), problem(name)[2].grads, 1e-3)
