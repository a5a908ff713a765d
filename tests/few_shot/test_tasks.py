"""Tasks go by number: seed, epoch and number decide, and what is drawn is checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.tasks import Numbers, same_numbers


def test_a_task_goes_by_seed_epoch_and_number() -> None:
    drawn = {
        (seed, epoch, index): float(Numbers(9, seed)[epoch, index].outer)
        for seed in range(3)
        for epoch in range(3)
        for index in range(9)
    }
    assert len(set(drawn.values())) == 81
    assert float(Numbers(20, seed=2)[1, 5].outer) == drawn[2, 1, 5]
    assert float(Numbers(9)[5].outer) == drawn[0, 0, 5]
    fixed = Numbers(9, fixed=True)
    assert same_numbers([fixed[3, 5]], [fixed[5]])


@pytest.mark.parametrize("index", [-1, 9, (1, 9)])
def test_numbers_of_tasks_are_checked(index: Any) -> None:
    with pytest.raises(IndexError, match="^Expected the number of a task to be from 0 to 8, got"):
        Numbers(9)[index]


def test_what_draw_returns_is_checked() -> None:
    class Wrong(Numbers):
        def draw(self, generator: torch.Generator) -> Any:
            return torch.zeros(1)

    with pytest.raises(ValueError, match=r"^Expected `Wrong\.draw\(generator\)` to be an `Episode`, got tensor"):
        Wrong(1)[0]
