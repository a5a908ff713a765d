"""How many directions go together, and that what is put together is told apart again."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_bilevel import problem
from lightning_bilevel.problem import InnerState
from lightning_bilevel.strategies import chunks
from tests.support.problems import Mlp, episodes


def sizes(run: Any, count: int, size: int | None = None) -> list[int]:
    return [last - first for first, last in run.chunks(0, count, size)]


@pytest.fixture
def run() -> chunks.DirectionalRun:
    made = Mlp("SGD", learned=False).functional()
    return chunks.DirectionalRun(made.problem, InnerState(made.theta()), made.phi(), episodes(1)[0])


def bytes_of_a_direction(run: chunks.DirectionalRun) -> int:
    theta = sum(value.numel() * value.element_size() for value in run.memory.params.values())
    return 4 * theta + sum(value.numel() * value.element_size() for value in run.phi.values())


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
def test_directions_by_memory(
    enough: int, most: int, expected: list[int], run: chunks.DirectionalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = bytes_of_a_direction(run)
    monkeypatch.setattr(chunks, "TANGENT_BYTES_CPU", enough * unit)
    monkeypatch.setattr(chunks, "TANGENT_BYTES", most * unit)
    assert sizes(run, 16) == expected


def test_a_size_that_is_asked_for_is_the_largest(run: chunks.DirectionalRun) -> None:
    assert sizes(run, 16, 5) == [4, 4, 4, 4]
    assert sizes(run, 16, 16) == [16]
    assert sizes(run, 3, 16) == [3]
    assert sizes(run, 0, 4) == []


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def test_vectorized_functions_get_the_containers_they_know() -> None:
    x, y = torch.arange(6.0).view(3, 2), torch.arange(3.0)
    seen: list[type] = []

    def fn(theta: dict[str, Tensor], batch: Any, nothing: dict[str, Tensor]) -> Tensor:
        seen.extend(map(type, (theta, batch, batch[0], batch[1], nothing)))
        return (theta["w"] * batch[0].x).sum() + batch[1]["y"] - batch[0].y

    theta, batch = {"w": x + 1}, [Pair(x, y), OrderedDict(y=2 * y)]
    found = problem.vectorized(fn, theta, batch, {}, randomness="different")
    assert seen == [dict, list, Pair, OrderedDict, dict]
    assert torch.equal(found, ((x + 1) * x).sum(1) + y)
