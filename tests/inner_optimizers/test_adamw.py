"""AdamW is Adam with a decay beside the gradient."""

from __future__ import annotations

import torch

from lightning_bilevel import tree
from lightning_bilevel.inner_optimizers import Adam, AdamW
from tests.support.optimizers import gradient, start


def test_decay_shrinks_the_parameter_and_leaves_the_step_alone() -> None:
    params = start()
    plain, decayed = (
        optimizer.update(params, gradient(params, 1), optimizer.init(params), 1)[0]
        for optimizer in (Adam(lr=0.1), AdamW(lr=0.1, weight_decay=0.5))
    )
    torch.testing.assert_close(decayed, tree.add(plain, params, alpha=-0.1 * 0.5))
