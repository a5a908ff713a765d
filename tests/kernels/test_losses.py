"""Losses, activations and reductions of PyTorch under forward mode: what reverse mode gives, or an error by name.

Three problems for each: only a learned rate is outer, so that the loss itself has no tangent at first; a scale and a
shift of the outputs; and a scale of the targets, where there is a derivative in them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, Episode, ForwardUnroll, ReverseUnroll, hypergradient
from lightning_bilevel.kernels import losses
from lightning_bilevel.kernels.safe import differentiable_kernels, forward_mode_kernels
from tests.support.problems import draw
from tests.support.seeds import forked

X, Y = draw(6, 4, seed=0), draw(6, 3, seed=1)
CLASSES, SIGNS = torch.tensor([0, 1, 2, 0, 1, 2]), torch.where(Y > 0, 1.0, -1.0)
WEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

Loss = Callable[[Tensor, Tensor], Tensor]

# Of outputs and targets, both (6, 3).
OF_TARGETS: dict[str, Loss] = {
    "mse_loss": F.mse_loss,
    "mse_loss, sum": lambda out, y: F.mse_loss(out, y, reduction="sum"),
    "mse_loss, none": lambda out, y: F.mse_loss(out, y, reduction="none").mean(),
    "l1_loss": F.l1_loss,
    "smooth_l1_loss": lambda out, y: F.smooth_l1_loss(out, y, beta=0.5),
    "huber_loss": lambda out, y: F.huber_loss(out, y, delta=0.7),
    "huber_loss, sum": lambda out, y: F.huber_loss(out, y, delta=0.7, reduction="sum"),
    "binary_cross_entropy": lambda out, y: F.binary_cross_entropy(out.sigmoid(), y.sigmoid()),
    "binary_cross_entropy_with_logits": lambda out, y: F.binary_cross_entropy_with_logits(out, y.sigmoid()),
    "kl_div": lambda out, y: F.kl_div(out.log_softmax(1), y.softmax(1), reduction="batchmean"),
    "kl_div, log_target": lambda out, y: F.kl_div(
        out.log_softmax(1), y.log_softmax(1), log_target=True, reduction="sum"
    ),
    "cross_entropy of probabilities": lambda out, y: F.cross_entropy(out, y.softmax(1)),
    "poisson_nll_loss": lambda out, y: F.poisson_nll_loss(out, y.exp()),
    "gaussian_nll_loss": lambda out, y: F.gaussian_nll_loss(out, y, out.exp()),
    "cosine_embedding_loss": lambda out, y: F.cosine_embedding_loss(out, y + 1, SIGNS[:, 0]),
    "triplet_margin_loss": lambda out, y: F.triplet_margin_loss(out, y, y.flip(0), margin=3.0),
    "scaled_dot_product_attention": lambda out, y: (F.scaled_dot_product_attention(out, y, y) * Y).sum(),
    "norm of a difference": lambda out, y: (out - y).norm(dim=1).sum(),
}
OTHERS: dict[str, Loss] = {
    "nll_loss": lambda out, _: F.nll_loss(out.log_softmax(1), CLASSES, weight=WEIGHTS),
    "cross_entropy": lambda out, _: F.cross_entropy(out, CLASSES),
    "cross_entropy, smoothed and weighted": lambda out, _: F.cross_entropy(
        out, CLASSES, weight=WEIGHTS, label_smoothing=0.1
    ),
    "cross_entropy, ignored": lambda out, _: F.cross_entropy(out, CLASSES, ignore_index=1),
    "binary_cross_entropy_with_logits, weighted": lambda out, _: F.binary_cross_entropy_with_logits(
        out, Y.sigmoid(), pos_weight=WEIGHTS
    ),
    "soft_margin_loss": lambda out, _: F.soft_margin_loss(out, SIGNS),
    "hinge_embedding_loss": lambda out, _: F.hinge_embedding_loss(out, SIGNS),
    "multilabel_soft_margin_loss": lambda out, _: F.multilabel_soft_margin_loss(out, (Y > 0).double()),
    "layer_norm": lambda out, _: (F.layer_norm(out, (3,)) * Y).sum(),
    "group_norm": lambda out, _: (F.group_norm(out.view(2, 3, 3), 1) * Y.view(2, 3, 3)).sum(),
    "rms_norm": lambda out, _: (F.rms_norm(out, (3,)) * Y).sum(),
    "batch_norm": lambda out, _: (F.batch_norm(out, None, None, training=True) * Y).sum(),
    "embedding": lambda out, _: F.embedding(CLASSES, out).square().sum(),
    "max_pool": lambda out, _: F.max_pool1d(out, 2).square().sum(),
    "cumsum": lambda out, _: out.cumsum(0).square().sum(),
    "cumprod": lambda out, _: out.cumprod(0).sum(),
    "prod": lambda out, _: out.prod(1).square().sum(),
    "std": lambda out, _: out.std(),
    "logsumexp": lambda out, _: out.logsumexp(1).square().sum(),
    **{
        name: (lambda out, _, name=name: getattr(F, name)(out).square().sum())
        for name in ("gelu", "silu", "softplus", "elu", "mish", "hardswish", "hardsigmoid", "logsigmoid", "relu6")
    },
}
LOSSES = {**OF_TARGETS, **OTHERS}


class Scaled(BilevelModule):
    def __init__(self, loss: Loss, outer: str) -> None:
        super().__init__(inner_steps=2, inner_start="reset")
        with forked(0):
            self.net = nn.Linear(4, 3).double()
        self.amount = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.loss, self.outer = loss, outer

    def inner_parameters(self) -> Any:
        return self.net

    def inner_loss(self, batch: Any) -> Tensor:
        x, y = batch
        out = self.net(x) * (1 + self.amount) + self.amount * WEIGHTS if self.outer == "scale" else self.net(x)
        return self.loss(out, y * self.amount if self.outer == "target" else y)

    def outer_loss(self, batch: Any) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.02 * self.amount.exp() if self.outer == "rate" else 0.02, momentum=0.5)


EPISODE = Episode([(X, Y)], (X.flip(0), Y))


@pytest.mark.parametrize(
    ("name", "outer"),
    [*product(LOSSES, ["rate", "scale"]), *product(OF_TARGETS, ["target"])],
)
def test_forward_mode_gives_what_reverse_mode_gives(name: str, outer: str) -> None:
    module = Scaled(LOSSES[name], outer)
    found, expected = (
        hypergradient(module, how, EPISODE).grads for how in (ForwardUnroll(mode="forward"), ReverseUnroll())
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


WITHOUT: dict[str, Loss] = {
    "grid_sampler_2d": lambda out, _: F.grid_sample(
        out.view(1, 1, 6, 3), Y.tanh()[None, :, None, :2], align_corners=False
    ).sum(),
    "_ctc_loss": lambda out, _: F.ctc_loss(out.log_softmax(1), CLASSES[None, 1:3], torch.tensor(6), torch.tensor(2)),
    "_cdist_forward": lambda out, y: torch.cdist(out, y).sum(),
    "multi_margin_loss": lambda out, _: F.multi_margin_loss(out, CLASSES),
    "igamma": lambda out, _: torch.igamma(WEIGHTS[0], out.exp()).sum(),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_forward_mode_is_named(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"^Trying to use forward AD with {name} that does not support it"):
        hypergradient(Scaled(WITHOUT[name], "scale"), ForwardUnroll(mode="forward"), EPISODE)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("name", "target", "options"),
    [("mse_loss", Y, {}), ("huber_loss", Y, {"delta": 0.3}), ("soft_margin_loss", SIGNS.double(), {})],
)
def test_kernels_are_pytorchs_losses(name: str, target: Tensor, options: dict[str, float], reduction: str) -> None:
    out, v = (X[:, :3] * 4).requires_grad_(), draw(6, 3, seed=5)

    def all_of() -> list[Tensor]:
        value = getattr(F, name)(out, target, reduction=reduction, **options)
        (first,) = torch.autograd.grad(value.square().sum(), out, create_graph=True)
        return [value, first, *torch.autograd.grad(first, out, v)]

    expected, native = all_of(), getattr(F, name)
    with forward_mode_kernels():
        assert getattr(losses.OWNER, name) is getattr(losses, name)
        torch.testing.assert_close(all_of(), expected)
    assert getattr(losses.OWNER, name) is not getattr(losses, name)
    assert getattr(F, name) is native


def test_hardsigmoid_is_pytorchs() -> None:
    x = torch.linspace(-4, 4, 17, dtype=torch.float64).requires_grad_()  # the corners are among them
    expected = F.hardsigmoid(x)
    slopes = torch.autograd.grad(expected.sum(), x)
    with differentiable_kernels(None):
        found = F.hardsigmoid(x)
        torch.testing.assert_close((found, *torch.autograd.grad(found.sum(), x)), (expected, *slopes))


def test_weights_of_a_loss() -> None:
    weight = Y.abs()
    for native in (F.mse_loss, F.huber_loss):
        try:
            expected = native(X[:, :3], Y, weight=weight)
        except TypeError:
            pytest.skip("this PyTorch has no weights there")
        with forward_mode_kernels():
            torch.testing.assert_close(native(X[:, :3], Y, weight=weight), expected)
