"""The cross entropy of a linear layer, asked for in chunks: PyTorch's gradient of it has no graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bilevel.kernels.safe import differentiable_kernels
from tests.support.problems import draw, generator

pytestmark = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="PyTorch has it from 2.13 on")

STEP = 1e-5


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunks_have_a_second_derivative(reduction: str) -> None:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    x, y = draw(6, 3, seed=1), torch.randint(4, (6,), generator=generator(2))
    weight, v, w = (draw(4, 3, seed=seed) for seed in (3, 4, 5))

    def gradient(weight: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        leaf = weight.clone().requires_grad_()
        losses = F.linear_cross_entropy(x, leaf, y, reduction=reduction, options=options)
        return leaf, torch.autograd.grad(losses.square().sum(), leaf, create_graph=create_graph)[0]

    ends = [gradient(weight + sign * STEP * v)[1] for sign in (1, -1)]
    with differentiable_kernels(nn.Identity()):
        leaf, found = gradient(weight, create_graph=True)
        (second,) = torch.autograd.grad((found * w).sum(), leaf)
    torch.testing.assert_close(found, gradient(weight)[1])
    expected = ((ends[0] - ends[1]) * w).sum().item() / (2 * STEP)
    assert (second * v).sum().item() == pytest.approx(expected, rel=1e-6)
