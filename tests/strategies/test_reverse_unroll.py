"""ReverseUnroll holds the whole run, or what its checkpoints need."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bilevel import ReverseUnroll, hypergradient
from tests.support.problems import Mlp, RidgeSolver, assert_close, episodes
from tests.support.watched import most_held

CHECKPOINTS = [1, 2, 5, "sqrt"]


def test_a_whole_graph_is_not_flat() -> None:
    assert most_held(ReverseUnroll(), 40) >= 40 > most_held(ReverseUnroll(checkpoint="sqrt"), 40)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_short_runs_take_no_step_more_than_twice(steps: int, checkpoint: Any) -> None:
    class Counting(Mlp):
        taken = 0

        def inner_loss(self, batch: Any) -> Any:
            self.taken += 1
            return super().inner_loss(batch)

    module, (episode,) = Counting("Adam", inner_steps=steps), episodes(1)
    exact = hypergradient(module, ReverseUnroll(), episode).grads
    looks = module.taken - steps
    module.taken = 0
    assert_close(hypergradient(module, ReverseUnroll(checkpoint=checkpoint), episode).grads, exact, 1e-12)
    assert module.taken - looks <= 2 * steps - 1  # all but the last twice


@pytest.mark.parametrize("checkpoint", [None, *CHECKPOINTS])
def test_a_solver_is_a_run_of_one_step(checkpoint: Any) -> None:
    module = RidgeSolver()
    grads = hypergradient(module, ReverseUnroll(checkpoint=checkpoint), module.episode()).grads
    assert_close(grads, module.optimum(module.episode()).grads, 1e-10)
