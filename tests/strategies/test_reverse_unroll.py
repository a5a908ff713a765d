"""ReverseUnroll holds the whole run, or what its checkpoints need."""

from __future__ import annotations

from lightning_bilevel import ReverseUnroll
from tests.support.watched import most_held


def test_a_whole_graph_is_not_flat() -> None:
    assert most_held(ReverseUnroll(), 40) >= 40 > most_held(ReverseUnroll(checkpoint="sqrt"), 40)
