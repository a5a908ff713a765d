"""RMSprop with a centered square average."""

from __future__ import annotations

import torch

from lightning_bilevel import tree
from lightning_bilevel.inner_optimizers import RMSprop
from tests.support.optimizers import run, start


def test_rounding_below_zero_variance_is_not_nan():
    """With a constant gradient the centered square average is 0 up to rounding."""
    params = run(RMSprop(alpha=0.1, centered=True), start(), 60, lambda params, step: tree.map(torch.ones_like, params))
    assert tree.first_nonfinite(params) is None
