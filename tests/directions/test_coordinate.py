"""One coordinate at a time."""

from __future__ import annotations

import torch

from lightning_bilevel.directions import Coordinate
from tests.support.seeds import key_of


def test_one_entry_is_the_root_of_the_dimension_and_each_has_its_turn() -> None:
    rows = Coordinate().flat(key_of(), 0, 600, torch.zeros(4))
    assert rows.count_nonzero(dim=1).unique().tolist() == [1]
    assert rows.sum(1).unique().tolist() == [2.0]
    turns = rows.count_nonzero(dim=0)
    assert (turns - 150).abs().max() <= 4 * (600 * 3 / 16) ** 0.5
