"""Graphs are made with draws put back, and with words for what cannot be made."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_bilevel.compiled import making
from lightning_bilevel.compiled.making import made_once
from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.testing import Quadratic


def make(function: Callable[[], Any], check: Callable[[Any], None] = lambda made: None) -> Any:
    return made_once(Quadratic().functional(), function, check, "a number", "by hand")


def test_draws_are_put_back_and_the_time_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(making, "rank_zero_info", said.append)
    before = torch.get_rng_state()
    assert make(lambda: torch.rand(()) * 0 + 3) == 3
    assert torch.equal(before, torch.get_rng_state())
    assert said[0].startswith("Compiled a number of `Quadratic` (by hand) in ")


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_draws_beside_torch_are_refused(draw: Callable[[], float]) -> None:
    with pytest.raises(NotCompiled, match="draws from NumPy"):
        make(draw)


def test_any_error_says_what_is_behind_it() -> None:
    def fail() -> None:
        raise RuntimeError("outside") from ValueError("Within.\nMore.")

    with pytest.raises(NotCompiled, match=r"^Within\.$"):
        make(fail)


def test_what_is_not_the_same_is_refused() -> None:
    def check(made: int) -> None:
        raise NotCompiled(f"{made} is another number")

    with pytest.raises(NotCompiled, match="1 is another number"):
        make(lambda: 1, check)
