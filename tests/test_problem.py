"""What is put together for one vectorized call is told apart again."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bilevel import problem


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
