"""The table of past gradients: unbiased whatever is in it, and equal in many processes that average it."""

from __future__ import annotations

import pytest
import torch

from lightning_bilevel import tree
from lightning_bilevel.data.numbered import Place
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.strategies.gradient_table import GradientTable
from tests.support.problems import assert_close, draw

GRADIENTS = [{"w": draw(3, seed=number)} for number in range(4)]
MEAN = {"w": torch.stack([each["w"] for each in GRADIENTS]).mean(0)}


def filled(*numbers: int) -> GradientTable:
    table = GradientTable({})
    for number in numbers:
        table.corrected("g", {"w": draw(3, seed=50 + number)}, Place(number, 4))
    return table


def averaged(tables: list[GradientTable]) -> GradientTable:
    def mean(*values: torch.Tensor) -> torch.Tensor:
        return torch.stack(values).mean(0)

    kept = [table.kept for table in tables]
    return GradientTable({name: tree.map(mean, *(each[name] for each in kept)) for name in kept[0]})


@pytest.mark.parametrize(
    "table",
    [filled(), filled(2), filled(0, 1, 2, 3, 3), averaged([filled(0, 1), filled(0, 3)])],
    ids=["empty", "begun", "full", "averaged"],
)
def test_its_mean_over_batches_is_that_of_the_gradients(table: GradientTable) -> None:
    used = [GradientTable(table.kept).corrected("g", g, Place(i, 4)) for i, g in enumerate(GRADIENTS)]
    assert_close({"w": torch.stack([each["w"] for each in used]).mean(0)}, MEAN, 1e-12)


def test_no_noise_is_left_where_points_rest() -> None:
    tables = [GradientTable({}), GradientTable({})]  # two processes, which average
    for step in range(400):
        for rank, table in enumerate(tables):
            place = Place((step + 2 * rank) % 4, 4)
            used = table.corrected("g", GRADIENTS[place.number], place)
            if step > 300:
                assert_close(used, MEAN, 1e-12)
        mean = averaged(tables)
        tables = [GradientTable(mean.kept) for _ in range(2)]


def test_what_was_carried_is_left_alone() -> None:
    table = filled(0, 1)
    before = {name: tree.map(torch.clone, values) for name, values in table.kept.items()}
    after = GradientTable(table.kept)
    after.corrected("g", GRADIENTS[1], Place(1, 4))
    assert all(torch.equal(table.kept[name][key], value) for name in before for key, value in before[name].items())
    changed = {name for name in after.kept if after.kept[name] is not table.kept[name]}
    assert changed == {"g 1", "g sum", "g weights"}  # the rest is shared
    addresses = [value.data_ptr() for values in after.kept.values() for value in values.values()]
    assert len(set(addresses)) == len(addresses)  # averaged in place, so each by itself


def test_another_number_of_batches_is_refused() -> None:
    with pytest.raises(MisconfigurationError, match="^Cannot use a batch that is one of 3"):
        filled(0).corrected("g", GRADIENTS[0], Place(0, 3))
