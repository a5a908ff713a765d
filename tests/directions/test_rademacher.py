"""Random signs."""

from __future__ import annotations

import pytest
import torch

from lightning_bilevel.directions import Rademacher
from tests.support.seeds import key_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_every_entry_is_a_sign_in_every_dtype(dtype: torch.dtype) -> None:
    rows = Rademacher().flat(key_of(), 0, 200, torch.zeros(6, dtype=dtype))
    assert set(rows.flatten().tolist()) == {-1.0, 1.0}
    assert rows.double().mean(0).abs().max() <= 4 / 200**0.5
