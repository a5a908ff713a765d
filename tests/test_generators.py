"""Generators of all kinds are found, seeded and put back."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from lightning_bilevel import (
    SGD,
    BilevelModule,
    Episode,
    ForwardUnroll,
    ReverseUnroll,
    ZerothOrder,
    hypergradient,
)
from lightning_bilevel.directions import Orthogonal
from lightning_bilevel.generators import generators_of, moved, process_generators, seed, set_state, state_of
from lightning_bilevel.randomness import RngState, forks_told, repeating
from tests.support.problems import draw

CPU = torch.device("cpu")

# A generator of every kind, and how it is drawn from.
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch": (torch.Generator, lambda g: torch.rand(3, generator=g, dtype=torch.float64).tolist()),
    "random": (lambda: random.Random(3), lambda g: [g.random(), g.gauss(0, 1)]),
    "numpy": (lambda: np.random.default_rng(3), lambda g: g.normal(size=3).tolist()),
    "numpy, MT19937": (lambda: np.random.Generator(np.random.MT19937(3)), lambda g: g.normal(size=3).tolist()),
    "numpy, SFC64": (lambda: np.random.Generator(np.random.SFC64(3)), lambda g: g.normal(size=3).tolist()),
    "numpy, old": (lambda: np.random.RandomState(3), lambda g: g.normal(size=3).tolist()),
    "numpy, old with new bits": (
        lambda: np.random.RandomState(np.random.PCG64(3)),
        lambda g: g.normal(size=3).tolist(),
    ),
    "bits": (lambda: np.random.Philox(3), lambda g: g.random_raw(3).tolist()),
    "random of the process": (lambda: process_generators()[0], lambda g: [random.random(), random.gauss(0, 1)]),
    "numpy of the process": (lambda: process_generators()[1], lambda g: np.random.randn(3).tolist()),
}

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_states_are_put_back(kind: str) -> None:
    make, drawn = KINDS[kind]
    generator = make()
    drawn(generator)  # three normal numbers of the old kinds leave a fourth in the state
    state = state_of(generator)
    first = drawn(generator)
    assert moved(generator, state)
    set_state(generator, state)
    assert not moved(generator, state)
    assert drawn(generator) == first


@every_kind
def test_seeds_start_anew(kind: str) -> None:
    make, drawn = KINDS[kind]
    generator, found = make(), []
    before = state_of(generator)
    for number in (5, 2**63 - 1, 5):
        seed(generator, number)
        found.append(drawn(generator))
    set_state(generator, before)
    assert found[0] == found[2] != found[1]


def test_where_a_fork_begins_and_ends_is_told() -> None:
    told: list[Any] = []
    with RngState(CPU).fork(), forks_told(told.append):
        with RngState(CPU).fork():
            told.append("in it")
    assert told == [True, "in it", False]
    with RngState(CPU).fork():
        pass
    assert len(told) == 3


@every_kind
def test_a_fork_leaves_no_trace(kind: str) -> None:
    make, drawn = KINDS[kind]
    generator = make()
    state, found = RngState(CPU, [generator]), []
    for number in (1, 2, 1):
        with state.fork(number):
            now = RngState(CPU, [generator])
            assert now.untouched()
            found.append(drawn(generator))
            assert now.drawn() == [generator]
            assert not now.untouched()
            now.restore()
            assert now.untouched()
            assert drawn(generator) == found[-1]
        assert state.untouched()
    assert found[0] == found[2] != found[1]


def test_generators_of_one_kind_draw_different_numbers() -> None:
    several = [torch.Generator(), torch.Generator()]
    with RngState(CPU, several).fork(1):
        first, second = (torch.rand(3, generator=generator) for generator in several)
        assert not torch.equal(first, second)
        assert not torch.equal(first, torch.rand(3))


def test_snapshots_inside_keep_what_is_to_be_repeated() -> None:
    generator = torch.Generator()
    with repeating([generator, generator]):
        inside = RngState(CPU)
        first = torch.rand(3, generator=generator)
        assert inside.drawn() == [generator]
        inside.restore()
        assert torch.equal(first, torch.rand(3, generator=generator))
        assert RngState(CPU, ()).drawn() == []
    assert RngState(CPU).drawn() == []
    with repeating([]):
        outside = RngState(CPU)
        torch.rand(3, generator=generator)
        assert outside.untouched()


# --- Finding them ---

OF_THE_FILE = np.random.default_rng(1)
IN_A_LIST = [torch.Generator()]


def helper() -> float:
    return OF_THE_FILE.random()


def another() -> float:
    return (lambda: torch.rand((), generator=IN_A_LIST[0]).item())()


class Augmentation:
    def __init__(self) -> None:
        self.options = {"how": [random.Random(1)]}


class Slotted:
    __slots__ = ("generator",)

    def __init__(self) -> None:
        self.generator = np.random.RandomState(1)


class Noisy(Dataset):
    def __init__(self) -> None:
        self.generator = torch.Generator()

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand((), generator=self.generator)


def closure() -> Callable[[], Tensor]:
    generator = torch.Generator()
    return lambda: torch.rand(3, generator=generator)


class OfItsClass(nn.Module):
    generator = random.Random(1)


class Names(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * helper()


class NamesAnother(nn.Module):
    @property
    def scale(self) -> float:
        return another()

    @staticmethod
    def draw(generator: torch.Generator = torch.Generator()) -> Tensor:  # noqa: B008
        return torch.rand(3, generator=generator)


def holding(value: Any) -> nn.Module:
    module = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    module[1].value = value
    return module


PLACES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "attribute": (lambda: holding(torch.Generator()), 1),
    "list": (lambda: holding([1, "a", (torch.Generator(), None)]), 1),
    "dict": (lambda: holding({"a": {"b": np.random.default_rng(1)}}), 1),
    "deque": (lambda: holding(deque([random.Random(1)])), 1),
    "object": (lambda: holding(Augmentation()), 1),
    "slots": (lambda: holding(Slotted()), 1),
    "data set": (lambda: holding(Noisy()), 1),
    "data set of torch": (lambda: holding(Subset(Noisy(), [0])), 1),
    "method": (lambda: holding(Noisy().__getitem__), 1),
    "method in C": (lambda: holding([random.Random(1).random, np.random.default_rng(1).normal, random.random]), 2),
    "partial": (lambda: holding(functools.partial(torch.rand, generator=torch.Generator())), 1),
    "closure": (lambda: holding(closure()), 1),
    "class": (OfItsClass, 1),
    "name of a file": (Names, 1),
    "names in a property, and a default": (NamesAnother, 2),
    "the same twice": (lambda: holding([OF_THE_FILE, OF_THE_FILE]), 1),
    "those of the process": (lambda: holding([torch.default_generator, *process_generators()]), 0),
    "of the machine": (lambda: holding(random.SystemRandom()), 0),
    "none": (lambda: holding([nn.Linear(1, 1), torch.ones(3), "a", {"b": 1}]), 0),
}


@pytest.mark.parametrize("place", PLACES)
def test_generators_are_found(place: str) -> None:
    make, count = PLACES[place]
    assert len(generators_of(make())) == count


def test_circles_end() -> None:
    module = holding([torch.Generator()])
    module[1].value.append(module[1].value)
    module[0].__dict__["owner"] = module
    assert len(generators_of(module)) == 1


def test_they_are_found_in_one_order() -> None:
    module = holding([Augmentation(), Slotted(), Noisy(), torch.Generator()])
    assert generators_of(module) == generators_of(module)


# --- Whole runs ---


class Masked(BilevelModule):
    """Masks of dropout, drawn by others than torch's own generator; ``kind`` is one of ``KINDS``."""

    def __init__(self, kind: str) -> None:
        super().__init__(inner_steps=4, inner_start="reset")
        make, self.drawn = KINDS[kind]
        self.generator = make()
        self.w, self.p = nn.Parameter(draw(3, seed=1)), nn.Parameter(draw(3, seed=2))

    def inner_parameters(self):
        return [self.w]

    def inner_loss(self, batch):
        mask = torch.tensor(self.drawn(self.generator)[:2] * 2, dtype=torch.float64)[:3].sigmoid()
        return ((self.w * mask - batch) ** 2).sum() + (self.p.exp() * self.w**2).sum()

    def outer_loss(self, batch):
        return ((self.w - batch) ** 2).sum()

    def configure_inner_optimizer(self):
        return SGD(lr=0.05)


def test_the_second_of_a_pair_of_normal_numbers_counts() -> None:
    generator = np.random.RandomState(0)
    for _ in range(3):
        before = state_of(generator)
        assert not moved(generator, before)
        value = generator.normal()
        assert moved(generator, before)
        set_state(generator, before)
        assert generator.normal() == value


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bits"])
def test_runs_are_repeated_whoever_draws(kind: str) -> None:
    module, batch = Masked(kind), draw(3, seed=3)
    found = [] if "process" in kind else generators_of(module)
    assert ("process" in kind) == (module.generator not in found)
    state = state_of(module.generator)
    with repeating([module.generator]):
        exact = hypergradient(module, ReverseUnroll(), Episode([batch], batch), seed=1).grads["p"]
        for strategy in (
            ReverseUnroll(checkpoint=1),
            ForwardUnroll(chunk_size=1),
            ZerothOrder(3, 1e-4, "central", Orthogonal()),
        ):
            grads = hypergradient(module, strategy, Episode([batch], batch), seed=1).grads["p"]
            torch.testing.assert_close(grads, exact, rtol=1e-5, atol=1e-7)
    assert not moved(module.generator, state)
