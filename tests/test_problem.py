"""Episodes that are put together, and what a problem of several is."""

from __future__ import annotations

import torch

from lightning_bilevel.problem import Episode, stack_episodes, stackable


def test_episodes_are_stacked_where_both_levels_are_alike() -> None:
    x, other = torch.ones(2), torch.ones(3)
    episode = Episode([x, x], {"a": x})
    assert stackable(episode, Episode((2 * x, x), {"a": x}))
    for different in (Episode([x], {"a": x}), Episode([x, other], {"a": x}), Episode([x, x], {"a": other})):
        assert not stackable(episode, different)
    both = stack_episodes([episode, Episode([2 * x, x], {"a": 3 * x})])
    assert torch.equal(both.inner[0], torch.stack([x, 2 * x]))
    assert torch.equal(both.outer["a"], torch.stack([x, 3 * x]))


def test_episodes_without_data() -> None:
    x = torch.ones(2)
    both = stack_episodes([Episode([None], x), Episode([None], 2 * x)])
    assert both.inner == [None]
    assert torch.equal(both.outer, torch.stack([x, 2 * x]))
