"""What the table of docs/compiled.md says has been tried: what is compiled, and what is not, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchmetrics import MeanMetric
from torchmetrics.functional import accuracy

from lightning_bilevel import ReverseUnroll
from tests.support.compiled import CLASSES, FEATURES, Weighted, apart, both, episode, weighted

FLAT, PLACES, IMAGE = (FEATURES,), (2, FEATURES), (1, 4, 4)


def chain(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), *middle, nn.Linear(8, CLASSES))


def convolved(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *middle, nn.Flatten(), nn.LazyLinear(CLASSES))


def seen(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    net(torch.randn(2, *shape))
    return net


class By(nn.Module):
    """A net, and what is done with it.

    Args:
        net: the net.
        call: of the net and the inputs, to its outputs.
    """

    def __init__(self, net: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.net, x)


def attention(**options: Any) -> nn.Module:
    net = nn.ModuleList([nn.MultiheadAttention(FEATURES, 2, batch_first=True, **options), nn.Linear(FEATURES, CLASSES)])
    return By(net, lambda net, x: net[1](net[0](x, x, x, key_padding_mask=x[..., 0] > 9)[0].mean(1)))


def fused(**options: Any) -> nn.Module:
    net = nn.ModuleList([nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, CLASSES)])

    def attend(net: Any, x: Tensor) -> Tensor:
        return net[1](F.scaled_dot_product_attention(*net[0](x).chunk(3, -1), **options).mean(1))

    return By(net, attend)


def embedded() -> nn.Module:
    net = nn.Sequential(nn.Embedding(5, FEATURES), nn.Linear(FEATURES, CLASSES))
    return By(net, lambda net, x: net(x[..., 0].abs().long() % 5).mean(1))


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(FEATURES, 2, 8, 0.0, batch_first=True)
    net = nn.ModuleList([nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(FEATURES, CLASSES)])
    mask = nn.Transformer.generate_square_subsequent_mask(2)
    return By(net, lambda net, x: net[1](net[0](x, mask=mask, **options).mean(1)))


COMPILED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "group norm": (lambda: chain(nn.GroupNorm(2, 8), nn.Tanh()), FLAT),
    "RMS norm": (lambda: chain(nn.RMSNorm(8), nn.GELU()), FLAT),
    "instance norm": (lambda: seen(convolved(nn.InstanceNorm2d(4, track_running_stats=True)), IMAGE), IMAGE),
    "masks of channels": (lambda: seen(convolved(nn.Dropout2d(), nn.MaxPool2d(2)), IMAGE), IMAGE),
    "masks of an SELU": (lambda: chain(nn.AlphaDropout(), nn.SELU(), nn.RReLU()), FLAT),
    "embedding": (embedded, PLACES),
    "attention with masks": (lambda: attention(dropout=0.5), PLACES),
    "fused attention": (lambda: fused(is_causal=True, dropout_p=0.5), PLACES),
    "fused attention, masked": (lambda: fused(attn_mask=torch.eye(2, dtype=torch.bool)), PLACES),
    "an encoder": (lambda: encoder(is_causal=False), PLACES),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(FEATURES, CLASSES)), FLAT),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_nets_that_are_compiled(name: str, calls: list[int]) -> None:
    net, shape = COMPILED[name]
    module = weighted(net=net, inner_steps=1)
    assert apart(*both(module, episodes=episode(features=shape))) < 2e-6
    assert calls


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "an encoder that compares masks": (encoder, PLACES, "data-dependent"),
    "the old weight norm": (lambda: nn.utils.weight_norm(nn.Linear(FEATURES, CLASSES)), FLAT, "it leaves tensors behi"),
    "masks in a checkpoint": (
        lambda: By(chain(nn.Dropout()), lambda net, x: checkpoint(net, x, use_reentrant=False)),
        FLAT,
        "it draws other random numbers",
    ),
    "a chain of checkpoints": (
        lambda: By(chain(nn.Tanh()), lambda net, x: checkpoint_sequential(net, 2, x, use_reentrant=False)),
        FLAT,
        "function marked as skipped",
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_nets_that_are_not(name: str) -> None:
    net, shape, because = REFUSED[name]
    module = weighted(net=net, inner_steps=1)
    with pytest.warns(UserWarning, match=f"The inner steps are not compiled: .*{because}"):
        assert apart(*both(module, episodes=episode(features=shape))) < 2e-6


class Judged(Weighted):
    """Measures something in its outer loss.

    Args:
        measure: of the module, its outputs and the targets.
    """

    def __init__(self, measure: Callable[[Any, Tensor, Tensor], Any], **options: Any) -> None:
        super().__init__(inner_steps=1, **options)
        self.measure, self.metric = measure, MeanMetric()

    def outer_loss(self, batch: Any) -> Tensor:
        outputs = self.net(batch[0])
        self.measure(self, outputs.detach(), batch[1])
        return F.cross_entropy(outputs, batch[1])


def of_torchmetrics(module: Any, outputs: Tensor, targets: Tensor, **options: Any) -> None:
    module.log("accuracy", accuracy(outputs, targets, task="multiclass", num_classes=CLASSES, **options))


MEASURES: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], str]] = {
    "by hand": (lambda m, outputs, y: m.log("accuracy", (outputs.argmax(-1) == y).float().mean()), ""),
    "a function": (lambda m, outputs, y: of_torchmetrics(m, outputs.argmax(-1), y, validate_args=False), ""),
    "a function that checks": (lambda m, outputs, y: of_torchmetrics(m, outputs.argmax(-1), y), "data-dependent"),
    "a metric": (lambda m, outputs, y: m.log("largest", m.metric(outputs.max())), ""),
    "what a metric says": (lambda m, outputs, y: m.log("half", m.metric(outputs.max()) / 2), "it computes with what"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURES)
def test_measures_in_the_outer_loss(name: str, recwarn: pytest.WarningsRecorder) -> None:
    measure, because = MEASURES[name]
    torch.manual_seed(0)
    module = Judged(measure)
    if because:
        with pytest.warns(UserWarning, match=f"The outer losses are not compiled: .*{because}"):
            assert apart(*both(module)) < 2e-6
    else:
        assert apart(*both(module)) < 2e-6


def penalized(module: Any, loss: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(module.net(torch.ones(1, FEATURES).requires_grad_()).sum(), module.net.weight)
    return loss + slope.sum()


@pytest.mark.slow
def test_an_input_that_requires_a_gradient() -> None:
    with pytest.warns(UserWarning, match="The inner steps are not compiled: .*requires_grad"):
        assert apart(*both(weighted(term=penalized, inner_steps=1), ReverseUnroll())) < 2e-6
