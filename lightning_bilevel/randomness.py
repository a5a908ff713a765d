"""Who draws what, repeatably: seeds made of words, keys that name draws, snapshots of the generators."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_bilevel.generators import moved, set_state, state_of
from lightning_bilevel.generators import seed as seed_generator


def seed_of(*words: int | str) -> int:
    """Return a 63-bit seed that depends on all words and their order.

    >>> seed_of(1, "inner") == seed_of(1, "inner"), seed_of(1, 2) == seed_of(2, 1)
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Key:
    """Names random draws, so that they can be made again anywhere: in a chunk, on another rank, after a resume.

    Attributes:
        words: whatever tells these draws from others: a seed, the number of the estimate, a rank.

    >>> first, again = (torch.rand(2, generator=Key((1,)).generator(7)) for _ in range(2))
    >>> torch.equal(first, again), Key((1,)).fold_in("guide") == Key((1, "guide"))
    (True, True)
    """

    words: tuple[int | str, ...] = (0,)

    def fold_in(self, *words: int | str) -> Key:
        """Return the key of other draws: independent of this key's, and of those of other words."""
        return Key((*self.words, *words))

    @property
    def seed(self) -> int:
        """The key as one number."""
        return seed_of(*self.words)

    def generator(self, index: int, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a fresh generator for draw number ``index``."""
        return torch.Generator(device).manual_seed(seed_of(*self.words, index))


@dataclass(frozen=True)
class Call:
    """One estimate among those of a fit.

    Attributes:
        key: of its random directions.
        shard: (i, n): this process evaluates the i-th of n shards of the directions.
        step: outer optimizer steps taken so far; does not change what is drawn.
        together: of draws that all processes make alike, where each has a key of its own; see :attr:`common`.

    >>> Call(Key((1,)), shard=(1, 2)).bounds(5)
    (3, 5)
    """

    key: Key = Key()
    shard: tuple[int, int] = (0, 1)
    step: int = 0
    together: Key | None = None

    @property
    def common(self) -> Key:
        """The key of draws that all processes make alike, for what is carried is averaged over them.

        >>> Call(Key((1, "rank 2")), together=Key((1,))).common
        Key(words=(1,))
        """
        return self.key if self.together is None else self.together

    def bounds(self, count: int) -> tuple[int, int]:
        """Return the range of direction numbers in this call's shard of ``range(count)``.

        >>> [Call(shard=(i, 3)).bounds(8) for i in range(3)]
        [(0, 3), (3, 6), (6, 8)]
        """
        part, parts = self.shard
        size, extra = divmod(count, parts)
        start = part * size + min(part, extra)
        return start, start + size + (part < extra)


_repeated: ContextVar[tuple[Any, ...]] = ContextVar("_repeated", default=())


@contextmanager
def repeating(generators: Iterable[Any]) -> Iterator[None]:
    """Let every snapshot that is taken inside keep these generators, too.

    Args:
        generators: of ``torch``, ``random`` or ``numpy``; see :mod:`lightning_bilevel.generators`.
    """
    token = _repeated.set(tuple({id(generator): generator for generator in generators}.values()))
    try:
        yield
    finally:
        _repeated.reset(token)


_told: ContextVar[Callable[[bool], None] | None] = ContextVar("_told", default=None)


@contextmanager
def forks_told(tell: Callable[[bool], None]) -> Iterator[None]:
    """Have a function called where :meth:`RngState.fork` begins (``True``) and ends inside, as a trace does not see."""
    token = _told.set(tell)
    try:
        yield
    finally:
        _told.reset(token)


class RngState:
    """A snapshot of random generators, so that a run can be repeated with the same dropout masks.

    Args:
        device: the device of the run; its generator is kept as well as the CPU's.
        sources: further generators; ``None`` takes those of :func:`repeating`.

    >>> generator = torch.Generator()
    >>> with RngState(torch.device("cpu"), [generator]).fork(seed=1):
    ...     first = torch.rand(2, generator=generator)
    >>> with RngState(torch.device("cpu"), [generator]).fork(seed=1):
    ...     torch.equal(first, torch.rand(2, generator=generator))
    True
    """

    def __init__(self, device: torch.device, sources: Iterable[Any] | None = None) -> None:
        self._device = device
        self._cpu, self._there = torch.get_rng_state(), generator_state(device)
        self._others = [(source, state_of(source)) for source in (_repeated.get() if sources is None else sources)]

    def untouched(self) -> bool:
        """Return whether nothing has been drawn since the snapshot was taken."""
        there = generator_state(self._device)
        return (
            torch.equal(self._cpu, torch.get_rng_state())
            and (self._there is None or there is None or torch.equal(self._there, there))
            and not self.drawn()
        )

    def drawn(self, among: Iterable[Any] | None = None) -> list[Any]:
        """Return the sources that have been drawn from since the snapshot was taken.

        Args:
            among: those to look at; default all.
        """
        asked = None if among is None else {id(source) for source in among}
        others = [(source, state) for source, state in self._others if asked is None or id(source) in asked]
        return [source for source, state in others if moved(source, state)]

    def restore(self, among: Iterable[Any] | None = None) -> None:
        """Put the generators back to where the snapshot was taken.

        Args:
            among: the sources that need it; default all.
        """
        torch.set_rng_state(self._cpu)
        set_generator_state(self._device, self._there)
        asked = None if among is None else {id(source) for source in among}
        for source, state in self._others:
            if asked is None or id(source) in asked:
                set_state(source, state)

    @contextmanager
    def fork(self, seed: int | None = None) -> Iterator[None]:
        """Restore the snapshot on exit: what runs inside leaves no trace in the generators.

        Args:
            seed: what runs inside starts from; ``None`` goes on from the present.
        """
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if self._there is not None:
                set_generator_state(self._device, torch.Generator(self._device).manual_seed(seed).get_state())
            for number, (source, _) in enumerate(self._others):
                seed_generator(source, seed_of(seed, number))
        tell = _told.get()
        if tell is not None:
            tell(True)
        try:
            yield
        finally:
            self.restore()
            if tell is not None:
                tell(False)


def generator_state(device: torch.device) -> Tensor | None:
    """Return the state of the generator of an accelerator; ``None`` on a CPU, and where there is none."""
    get = getattr(getattr(torch, device.type, None), "get_rng_state", None)
    return get(*_where(device)) if get is not None else None


def set_generator_state(device: torch.device, state: Tensor | None) -> None:
    """Put back what :func:`generator_state` returned, on a device of the same type."""
    if state is not None:
        getattr(torch, device.type).set_rng_state(state, *_where(device))


def _where(device: torch.device) -> tuple[torch.device, ...]:
    """Return how the functions for the generators of ``torch.cuda``, ``torch.xpu``, ``torch.mps`` name a device."""
    return () if device.type == "mps" else (device,)
