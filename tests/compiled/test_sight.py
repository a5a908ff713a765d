"""What all that a graph calls is watched by, and where the tensors stand that it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_bilevel import SGD
from lightning_bilevel.compiled.fingerprint import fingerprint
from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.compiled.sight import MOST_CHANGES, Sight, Sights
from lightning_bilevel.compiled.watch import Watchman
from lightning_bilevel.strategies.penalty_gradient import with_outer_loss
from tests.support.compiled import episode, weighted


def test_a_tensor_that_the_watch_has_not_seen_cannot_be_followed() -> None:
    functional = weighted().functional()
    sight = Sight([Watchman(functional, episode().outer)])
    with functional.session():
        sight.look(functional)
        sight.look_at_update(functional, 2)
        with pytest.raises(NotCompiled, match=r"it reads a tensor of shape \(3,\) that cannot be followed"):
            sight.places([torch.ones(3)], [False], functional, [], numbers=[2])
        (place,) = sight.places([known := torch.ones(3)], [True], functional, [], numbers=[2])
        assert place.value() is known


def test_a_tensor_that_is_read_and_given_cannot_be_followed() -> None:
    module: Any = weighted(term=lambda self, loss: loss * self.scale)
    module.scale = torch.tensor(2.0)
    functional = module.functional()
    sight = Sight([Watchman(functional, episode().outer)])
    with functional.session():
        sight.look(functional)
        assert sight.places([module.scale], [False], functional, [])[0].value() is not None
        with pytest.raises(NotCompiled, match="it reads a tensor that the strategy gives it, too"):
            sight.places([module.scale], [False], functional, [], held=[module.scale])


def test_both_losses_of_a_built_one_are_watched() -> None:
    module: Any = weighted()
    module.penalty = 1.0
    module.outer_loss = lambda batch: module.net(batch[0]).square().mean() * module.penalty
    functional, given = module.functional(), episode()
    made_of = fingerprint(with_outer_loss(functional.problem, given, 0.5))
    sight, _ = Sights().of(made_of, 0, given.inner[0], "inner")
    with functional.session():
        before = sight.look(functional)
        assert sight.look(functional) == before
        module.penalty = 2.0
        functional.turn()  # as where a hook runs, which may have done that
        assert sight.look(functional) != before


def test_the_penalty_is_watched() -> None:
    module: Any = weighted(optimizer=lambda module: SGD(lr=0.1, weight_decay=module.decay))
    module.decay = 0.1
    functional = module.functional()
    plain, sight = (Sight([Watchman(functional, episode().outer)], penalty) for penalty in (False, True))
    with functional.session():
        before = [each.look(functional) for each in (plain, sight)]
        module.decay = 0.2
        functional.turn()
        assert plain.look(functional) == before[0]
        assert sight.look(functional) != before[1]


def test_what_changes_all_the_time_is_counted() -> None:
    sights = Sights()
    for _ in range(MOST_CHANGES):
        sights.count("a")
    sights.count("b")
    with pytest.raises(NotCompiled, match="hooks, or what else surrounds the losses, change from step to step"):
        sights.count("a")
