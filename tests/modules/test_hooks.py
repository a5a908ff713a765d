"""What a user overrides, and what the defaults do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_bilevel import BilevelModule, Episode
from lightning_bilevel.errors import report
from tests.support.spoilt import EPISODE, X, Y, net, without_levels, zeros


@pytest.mark.parametrize(
    ("batch", "episodes"),
    [
        (EPISODE, [EPISODE]),
        ([EPISODE, EPISODE], [EPISODE, EPISODE]),
        ((EPISODE, EPISODE), [EPISODE, EPISODE]),
        ({"inner": X, "outer": Y}, [Episode([X], Y)]),
    ],
    ids=["one", "list", "tuple", "mapping"],
)
def test_what_a_loader_yields_is_episodes(batch: Any, episodes: list[Episode]) -> None:
    found = net().episodes(batch)
    assert isinstance(found, list)
    for own, expected in zip(found, episodes, strict=True):
        assert own.inner == expected.inner
        assert own.outer is expected.outer


@pytest.mark.parametrize(
    "batch", [X, (X, Y), [], [EPISODE, X], {"inner": X}, {"inner": X, "outer": Y, "more": X}, None]
)
def test_anything_else_is_not(batch: Any) -> None:
    message = r"^Expected `the training batch` to be an `Episode`, .*, got '\w+'\. Let `trainer.fit` or `train_data"
    with pytest.raises(ValueError, match=message):
        net().episodes(batch)


@pytest.mark.parametrize(
    ("methods", "missing"),
    [
        ({}, []),
        ({"inner_loss": None, "outer_loss": None}, ["outer_loss", "inner_loss"]),
        ({"configure_inner_optimizer": None}, ["configure_inner_optimizer"]),
        # A solver needs neither an inner loss nor an optimizer.
        ({"inner_loss": None, "configure_inner_optimizer": None, "solve_inner": zeros}, []),
        ({"outer_loss": None, "inner_loss": None, "solve_inner": zeros}, ["outer_loss"]),
        # One level is enough: the other is all the rest.
        ({"inner_parameters": None, "outer_parameters": lambda self: [self.log_penalty]}, []),
    ],
)
def test_hooks_that_are_missing_are_reported_together(methods: dict[str, Any], missing: list[str]) -> None:
    found = net(**methods).missing_hooks()
    assert [str(error).split("`")[3] for error in found] == missing
    assert str(report(found)).count("\n") == max(0, len(missing) - 1)


def test_a_level_is_missing_where_neither_is_named() -> None:
    assert [error.reason for error in without_levels().missing_hooks()] == ["`Net` has no `inner_parameters`"]


def test_a_hook_may_be_set_on_the_module_itself() -> None:
    """As a wrapper does, which takes losses as arguments."""
    module = net(outer_loss=None)
    module.outer_loss = lambda batch: torch.zeros(())
    assert module.missing_hooks() == []


def test_a_solver_is_seen_by_its_hook() -> None:
    assert net(solve_inner=zeros).has_solver
    assert not net().has_solver
    assert BilevelModule.differentiable_solve


def test_by_default_every_start_is_that_of_inner_start() -> None:
    assert net().initial_inner_parameters() == {}
