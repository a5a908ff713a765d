"""The global generator under a seed, and as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def forked(seed: int) -> Iterator[None]:
    """Seed what draws from the global generator (module constructors, dropout), and leave no trace in it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    """Return what ``build`` makes under a seed; the global generator stays as it was."""
    with forked(seed):
        return build()
