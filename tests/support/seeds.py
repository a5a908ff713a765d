"""The global generator under a seed, and as it was afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lightning_bilevel.randomness import Call, Key


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


@contextmanager
def forgotten() -> Iterator[None]:
    """Let Lightning seed everything, as a command line does, and forget it afterwards."""
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        for name in names:
            patch.delenv(name, raising=False)
        yield
        for name in names:
            os.environ.pop(name, None)


def key_of(seed: int = 0, estimate: int = 0, rank: int = 0) -> Key:
    """Return the key of an estimate, as a fit and :func:`hypergradient` make it."""
    return Key((seed, estimate, 0, rank))


def call_of(seed: int = 0, estimate: int = 0, rank: int = 0, shard: tuple[int, int] = (0, 1), step: int = 0) -> Call:
    """Return what names an estimate."""
    return Call(key_of(seed, estimate, rank), shard, step, together=key_of(seed, estimate))


def masks(seed: int = 0) -> int:
    """Return the seed of what the losses draw in the estimate under ``seed``."""
    return key_of(seed).fold_in(-1).seed
