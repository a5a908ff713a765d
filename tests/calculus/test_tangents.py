"""Tangents of an optimizer's update, pushed in parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_bilevel import ForwardGradient, hypergradient
from lightning_bilevel.calculus import tangents
from tests.support.problems import INNER_OPTIMIZERS, Mlp, episodes


@pytest.mark.parametrize("inner", sorted(INNER_OPTIMIZERS))
@pytest.mark.parametrize("learned", [False, True])
def test_an_update_in_parts_is_the_update(inner: str, learned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is one tensor and its optimizer state, here; learned rates are pushed along with each."""
    strategy, parts = ForwardGradient(3), []

    def spied(*args: Any) -> list[list[str]]:
        parts.append(made(*args))
        return parts[-1]

    made = tangents._parts
    monkeypatch.setattr(tangents, "_parts", spied)
    whole = hypergradient(Mlp(inner, learned=learned), strategy, episodes(1))
    assert {len(each) for each in parts} == {1}
    parts.clear()
    monkeypatch.setattr(tangents, "PART_BYTES", 1)
    cut = hypergradient(Mlp(inner, learned=learned), strategy, episodes(1))
    assert min(len(each) for each in parts) > 1
    assert all(torch.equal(value, cut.grads[name]) for name, value in whole.grads.items())
    assert all(torch.equal(value, cut.state.params[name]) for name, value in whole.state.params.items())
    assert cut.state.opt_state.keys() == whole.state.opt_state.keys()


def test_an_update_that_mixes_entries_gets_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tangents, "PART_BYTES", 1)
    problem = Mlp("SGD", learned=False).functional().problem
    pushed = {"a": torch.zeros(1, 4), "b": torch.zeros(1, 4)}
    assert tangents._parts(problem, pushed, ["a", "b"]) == [["a"], ["b"]]
    assert tangents._parts(replace(problem, elementwise=False), pushed, ["a", "b"]) == [["a", "b"]]
