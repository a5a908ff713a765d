"""A batch that is a list, and a list of batches: taken for what they are at every entrance, or refused."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bilevel import (
    SGD,
    BilevelModule,
    Episode,
    EpisodeLoader,
    FirstOrder,
    ReverseUnroll,
    audit,
    hypergradient,
)
from tests.support.modules import trainer
from tests.support.seeds import seeded

X, Y = torch.linspace(-1, 1, 15).view(5, 3), torch.tensor([0, 1, 1, 0, 1])
QUERY = (X.flip(0), Y)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Record:
    x: Tensor
    y: Tensor


class Graph:
    """As torch_geometric's: moved by a method of its own, and no container that Python knows."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, *args: Any, **kwargs: Any) -> Graph:
        return self


class Classifier(BilevelModule):
    """MAML on batches of any kind."""

    def __init__(self) -> None:
        super().__init__(inner_steps=2)
        self.net = nn.Linear(3, 2)

    def inner_parameters(self) -> Any:
        return self.net

    outer_parameters = inner_parameters

    def inner_loss(self, batch: Any) -> Tensor:
        if isinstance(batch, (dict, UserDict)):
            x, y = batch["x"], batch["y"]
        else:
            x, y = (batch.x, batch.y) if hasattr(batch, "x") else (batch[0], batch[1])
        return F.cross_entropy(self.net(x), y)

    outer_loss = inner_loss

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.outer_parameters(), lr=0.1)


class Rows(Classifier):
    """Its batches are bare tensors."""

    def inner_loss(self, batch: Any) -> Tensor:
        return self.net(batch).square().mean()

    outer_loss = inner_loss


def estimated(inner: Any) -> None:
    hypergradient(seeded(Classifier), FirstOrder(), Episode(inner, QUERY))


def adapted(inner: Any) -> None:
    with seeded(Classifier).adapted(inner):
        pass


def audited(inner: Any) -> None:
    audit(seeded(Classifier), Episode(inner, QUERY), [FirstOrder()], verbose=False)


def fitted(inner: Any) -> None:
    trainer(FirstOrder(), max_steps=1).fit(seeded(Classifier), DataLoader([Episode(inner, QUERY)], batch_size=None))


def of_a_plain_problem(inner: Any) -> None:
    module = seeded(Classifier)
    functional = module.functional()
    start = hypergradient(module, FirstOrder(), Episode([QUERY], QUERY)).carry
    hypergradient(functional.problem, FirstOrder(), Episode(inner, QUERY), carry=start, phi=functional.phi())


ENTRANCES: list[Callable[[Any], None]] = [estimated, adapted, audited, fitted, of_a_plain_problem]

ONE_BATCH = {
    "a dict": {"x": X, "y": Y},
    "a UserDict": UserDict(x=X, y=Y),
    "a NamedTuple": Pair(X, Y),
    "a dataclass": Record(X, Y),
    "an object that is moved": Graph(X, Y),
}


@pytest.mark.parametrize("kind", ONE_BATCH)
def test_one_batch_that_is_no_list_is_one(kind: str) -> None:
    batch = ONE_BATCH[kind]
    expected = hypergradient(seeded(Classifier), ReverseUnroll(), Episode([(X, Y)], QUERY))
    for inner in (batch, [batch]):
        found = hypergradient(seeded(Classifier), ReverseUnroll(), Episode(inner, QUERY))
        assert torch.equal(found.grads["net.weight"], expected.grads["net.weight"])
        with seeded(Classifier).adapted(inner) as module:
            assert torch.equal(module.net.weight, expected.state.params["net.weight"])


@pytest.mark.parametrize("kind", ONE_BATCH)
def test_batch_hooks_get_it_whole(kind: str) -> None:
    seen: list[Any] = []

    class Hooked(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            seen.append(type(batch))
            return batch

    data = DataLoader([Episode(ONE_BATCH[kind], QUERY)], batch_size=None)
    trainer(FirstOrder(), max_steps=1).fit(Hooked(), data)
    assert seen == [type(ONE_BATCH[kind]), list]  # PyTorch makes a list of the tuple


NOT_ALIKE = {
    "x and y": [X, Y],
    "a tuple": (X, Y),
    "another dtype": [X, X.double()],
    "another rank": [X, X[:, 0]],
    "another width": [X, X[:, :1]],
    "three": [X, Y, torch.arange(5)],
    "rows of numbers": [torch.ones(3), torch.ones(2)],
    "two inputs": [[X, X], Y],
    "words": [["a", "b"], Y],
    "nothing beside it": [X, None],
    "arrays": [np.ones((5, 3)), np.ones(5, dtype=int)],
}


@pytest.mark.parametrize("kind", NOT_ALIKE)
@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda entrance: entrance.__name__)
def test_the_parts_of_a_batch_are_not_taken_for_batches(entrance: Callable[[Any], None], kind: str) -> None:
    message = r"(?s)^Expected `Episode\(inner=...\)` to be a list of inner batches, got '.*one batch\? .* `\[\[a, b"
    with pytest.raises(ValueError, match=message):
        entrance(NOT_ALIKE[kind])


def test_both_readings_are_written_out() -> None:
    with pytest.raises(ValueError, match=r"got 'float32 \(5, 3\), int64 \(5\)'\.") as error:
        adapted([X, Y])
    adapted([[X, Y]])  # the one
    assert "`[[a, b]]`" in str(error.value)
    assert "2 batches? Write each in brackets of its own, `[[a], [b]]`" in str(error.value)


@pytest.mark.parametrize("inner", [[X], (X,), [X, X + 1], [X, X[:2]], [X[:2], X, X], [X] * 5])
def test_lists_of_tensors_that_a_loader_may_yield(inner: Any) -> None:
    hypergradient(Rows(), FirstOrder(), Episode(inner, X))
    with Rows().adapted(inner):
        pass


@pytest.mark.parametrize(
    "inner", [[(X, Y), [X, Y]], ((X, Y),), [{"x": X, "y": Y}] * 2, [Pair(X, Y), Pair(X[:2], Y[:2])]]
)
def test_lists_of_batches(inner: Any) -> None:
    for entrance in ENTRANCES:
        entrance(inner)


def test_an_episode_is_no_inner_batch() -> None:
    for entrance in ENTRANCES:
        with pytest.raises(ValueError, match=r"to be a list of inner batches, got 'Episode'\. Write `episode\.inner`"):
            entrance(Episode([(X, Y)], QUERY))


def test_what_a_loader_has_counted_is_not_guessed_at() -> None:
    """Batches of a loader may be tensors of any length, such as sentences."""

    class Sentences(Rows):
        def inner_loss(self, batch: Any) -> Tensor:
            return self.net(batch.float().mean(1, keepdim=True).expand(-1, 3)).square().mean()

        outer_loss = inner_loss

    batches = [torch.ones(2, 4), torch.ones(3, 5)]
    loader = EpisodeLoader(DataLoader(batches, batch_size=None), batches[:1], inner_batches=2)
    episode = next(iter(loader))
    hypergradient(Sentences(), FirstOrder(), episode)
    with Sentences().adapted(episode.inner):
        pass
    trainer(FirstOrder(), max_steps=1).fit(Sentences(), loader)


# --- Loaders ---


@pytest.mark.parametrize("level", ["inner", "outer"])
@pytest.mark.parametrize("kind", ["x and y", "a tuple", "another dtype", "three"])
def test_a_batch_is_no_loader(kind: str, level: str) -> None:
    levels = {"inner": [(X, Y)], "outer": [(X, Y)], level: NOT_ALIKE[kind]}
    message = rf"^Expected `EpisodeLoader\({level}=...\)` to be a list of batches, got '.*`\[\[a, b"
    with pytest.raises(ValueError, match=message):
        EpisodeLoader(**levels)


@pytest.mark.parametrize("level", ["inner", "outer"])
@pytest.mark.parametrize("batch", [X, {"x": X, "y": Y}, Pair(X, Y)], ids=lambda batch: type(batch).__name__)
def test_neither_is_one_that_is_no_list(batch: Any, level: str) -> None:
    levels = {"inner": [(X, Y)], "outer": [(X, Y)], level: batch}
    message = rf"^Expected `EpisodeLoader\({level}=...\)` to be a loader of batches, got '\w+'. Write .* `\[batch\]`"
    with pytest.raises(ValueError, match=message):
        EpisodeLoader(**levels)


# --- Where both readings run, and something else tells ---


def test_as_many_tensors_as_the_outer_batch_has_parts_are_pointed_out() -> None:
    pair = [torch.ones(2, 3), torch.ones(2, 3)]
    with pytest.warns(UserWarning, match=r"^2 tensors came as 2 inner batches, and the outer batch is a list of 2"):
        hypergradient(Squares(), FirstOrder(), Episode(pair, pair))
    hypergradient(Squares(), FirstOrder(), Episode([pair], pair))


def test_as_many_tensors_as_the_batches_of_the_fit_have_parts_are_pointed_out() -> None:
    module, pair = Squares(), [torch.ones(2, 3), torch.ones(2, 3)]
    with module.adapted(pair):  # which may be what is meant, for all that is known
        pass
    trainer(FirstOrder(), max_steps=1).fit(module, DataLoader([Episode([pair], pair)], batch_size=None))
    with pytest.warns(UserWarning, match=r"and an inner batch of the last estimate is a list of 2 parts\. If they are"):
        with module.adapted(pair):
            pass
    with module.adapted([pair]):
        pass


def test_an_outer_batch_in_brackets_is_pointed_out() -> None:
    with pytest.warns(UserWarning, match=r"^`Episode\(outer=...\)` is a list of one entry, which looks like an inner"):
        hypergradient(Squares(), FirstOrder(), Episode([(X, X)], [(X, X)]))
    with pytest.warns(UserWarning, match=r"^`Episode\(outer=...\)` is a list of one entry"):
        hypergradient(Squares(), FirstOrder(), Episode([X], [X]))
    hypergradient(Squares(), FirstOrder(), Episode([[X]], [X]))


class Squares(Rows):
    """Indexes whatever it gets."""

    def inner_loss(self, batch: Any) -> Tensor:
        first = batch[0]
        return self.net(first[0] if isinstance(first, tuple) else first).square().mean()

    outer_loss = inner_loss
