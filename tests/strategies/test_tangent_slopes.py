"""How many directions go through one run together, by memory."""

from __future__ import annotations

import pytest

from lightning_bilevel.problem import InnerState
from lightning_bilevel.strategies import tangent_slopes
from lightning_bilevel.strategies.tangent_slopes import TangentSlopes
from tests.support.problems import Mlp, episodes


def slopes(size: int | None = None) -> TangentSlopes:
    made = Mlp("SGD", learned=False).functional()
    return TangentSlopes(made.problem, InnerState(made.theta()), made.phi(), episodes(1)[0], size=size)


def sizes(made: TangentSlopes, count: int) -> list[int]:
    return [last - first for first, last in made.chunks(0, count)]


def bytes_of_a_direction(made: TangentSlopes) -> int:
    theta = sum(value.numel() * value.element_size() for value in made.carried.params.values())
    return 4 * theta + sum(value.numel() * value.element_size() for value in made.phi.values())


@pytest.mark.parametrize(
    ("enough", "most", "expected"),
    [
        (16, 100, [16]),
        (15, 100, [8, 8]),  # even, not 15 and 1
        (6, 100, [6, 6, 4]),
        (1, 100, [4, 4, 4, 4]),  # each chunk repeats the inner run
        (1, 2, [2] * 8),  # but memory comes first
        (0, 0, [1] * 16),
    ],
)
def test_directions_by_memory(enough: int, most: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made = slopes()
    unit = bytes_of_a_direction(made)
    monkeypatch.setattr(tangent_slopes, "TANGENT_BYTES_CPU", enough * unit)
    monkeypatch.setattr(tangent_slopes, "TANGENT_BYTES", most * unit)
    assert sizes(made, 16) == expected


def test_a_size_that_is_asked_for_is_the_largest() -> None:
    assert sizes(slopes(5), 16) == [4, 4, 4, 4]
    assert sizes(slopes(16), 16) == [16]
    assert sizes(slopes(16), 3) == [3]
    assert sizes(slopes(4), 0) == []
