"""What is put together for one vectorized call is told apart again."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor

from lightning_bilevel import PZOBO, Episode, ReverseUnroll, hypergradient
from lightning_bilevel.data.inputs import check_episodes, nonfinite
from lightning_bilevel.stacking import alike, flattened, nested, replaced, stacked, tensors_in, vectorized
from tests.support.modules import FEATURES, Maml
from tests.support.seeds import seeded


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Encoding(UserDict):
    """As that of transformers: a ``UserDict`` with an attribute, whose entries are attributes, too."""

    def __init__(self, data: Any, about: Any = None) -> None:
        super().__init__(data)
        self.about = about

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class Record:
    x: Tensor
    y: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    y: Tensor


@dataclass
class Checked:
    x: Tensor
    y: Tensor
    rows: Tensor = field(init=False)

    def __post_init__(self) -> None:
        assert self.x.shape[0] == self.y.shape[0]
        self.rows = torch.tensor(float(len(self.x)))


@dataclass
class Tagged:
    x: Tensor
    y: Tensor
    name: str = "a"


class Attributed(dict):
    """A recipe that many have: entries are attributes, and both are kept."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(**entries)
        self.__dict__.update(entries)


class Plain:
    """No container: such as a graph."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


STACKED = {
    "UserDict": lambda x, y: UserDict(x=x, y=y),
    "a UserDict with attributes": lambda x, y: Encoding({"x": x, "y": y}),
    "dataclass": Record,
    "dataclass with all": lambda x, y: Record(x, y, torch.ones(())),
    "frozen dataclass": Frozen,
    "checked dataclass": Checked,
    "OrderedDict": lambda x, y: OrderedDict(x=x, y=y),
    "NamedTuple": Pair,
    "nested": lambda x, y: Record(x, y, mask=(UserDict(a=[x]), None)),  # type: ignore[arg-type]
}
LOOPED = {
    "dataclass with a string": Tagged,
    "other attributes": lambda x, y: Encoding({"x": x, "y": y}, about=object()),
    "entries that are attributes": lambda x, y: Attributed(x=x, y=y),
    "no container": Plain,
    "a list with a number": lambda x, y: [x, y, 3],
}


def test_vectorized_functions_get_the_containers_they_know() -> None:
    x, y = torch.arange(6.0).view(3, 2), torch.arange(3.0)
    seen: list[type] = []

    def fn(theta: dict[str, Tensor], batch: Any, nothing: dict[str, Tensor]) -> Tensor:
        seen.extend(map(type, (theta, batch, *batch, nothing)))
        return (theta["w"] * batch[0].x).sum() + batch[1]["y"] - batch[2]["y"] + batch[3].y - batch[0].y

    theta, batch = {"w": x + 1}, [Pair(x, y), OrderedDict(y=2 * y), UserDict(y=y), Record(x, y), None]
    found = vectorized(fn, theta, batch, {}, randomness="different")
    assert seen == [dict, list, Pair, OrderedDict, UserDict, Record, type(None), dict]
    assert torch.equal(found, ((x + 1) * x).sum(1) + y)


@pytest.mark.parametrize("kind", [*STACKED, *LOOPED])
def test_what_is_stacked(kind: str) -> None:
    make: Any = {**STACKED, **LOOPED}[kind]
    batches = [make(torch.full((2, 3), value), torch.full((2,), value)) for value in (1.0, 2.0)]
    assert alike(*batches) == (kind in STACKED)
    if kind in STACKED:
        both = stacked(batches)
        assert type(both) is type(batches[0])
        entries = [[*map(torch.Tensor.clone, tensors_in(batch))] for batch in batches]
        assert all(
            torch.equal(a, torch.stack(b)) for a, b in zip(tensors_in(both), zip(*entries, strict=True), strict=True)
        )
        assert next(iter(tensors_in(batches[0]))).shape == (2, 3)  # what came is as it was


def get(batch: Any, name: str) -> Tensor:
    return (
        getattr(batch, name)
        if hasattr(batch, name)
        else batch[name]
        if hasattr(batch, "keys")
        else batch["xy".index(name)]
    )


CALLS: list[Any] = []


class Reads(Maml):
    def inner_loss(self, batch: Any) -> Tensor:
        CALLS.append(batch)
        return F.mse_loss(self.net(get(batch, "x")), get(batch, "y"))

    outer_loss = inner_loss


@pytest.mark.parametrize("kind", [*STACKED, *LOOPED])
def test_estimates_are_those_of_plain_batches(kind: str) -> None:
    make: Any = {**STACKED, **LOOPED}[kind]
    torch.manual_seed(1)
    pairs = [(torch.randn(4, FEATURES), torch.randn(4, 1)) for _ in range(6)]
    calls, found = [], []
    for how in (make, Pair):
        module = seeded(lambda: Reads(episode_chunk_size=3))
        episodes = [Episode([how(*pairs[i])], how(*pairs[i + 1])) for i in range(0, 6, 2)]
        found.append(hypergradient(module, ReverseUnroll(), episodes).grads)
        hypergradient(module, PZOBO(2, mu=0.1), episodes)
        calls.append(len(CALLS))
        CALLS.clear()
    torch.testing.assert_close(*found)
    assert (calls[0] == calls[1]) == (kind in STACKED)


@pytest.mark.parametrize("kind", STACKED)
def test_looking_into_containers(kind: str) -> None:
    make: Any = STACKED[kind]
    bad = make(torch.ones(2), torch.tensor([1.0, torch.nan]))
    good = make(torch.ones(2), torch.ones(2))
    assert nonfinite([Episode([good, bad], good)]) == "inner batch 2 of 2"
    assert nonfinite([Episode([good], good)]) is None
    with torch.inference_mode():
        made = make(torch.ones(2), torch.ones(2))
    (episode,) = check_episodes([Episode([made], good)], "Net")
    assert not any(part.is_inference() for part in tensors_in(episode.inner[0]))
    assert type(episode.inner[0]) is type(made)
    if kind not in ("frozen dataclass", "checked dataclass"):  # the one Lightning refuses, of the other it moves a part
        moved = move_data_to_device(Episode([good], good), torch.device("meta"))
        assert all(part.is_meta for part in tensors_in([moved.inner, moved.outer]))


def test_what_differs_is_not_stacked() -> None:
    x = torch.ones(2)
    different = [
        (UserDict(a=x), {"a": x}),
        (UserDict(a=x), UserDict(b=x)),
        (UserDict(a=x), UserDict(a=torch.ones(3))),
        (Record(x, x), Record(x, x, x)),
        (Record(x, x), Frozen(x, x)),
        (Encoding({"a": x}, 1), Encoding({"a": x}, 2)),
        (None, x),
        (x, x.double()),
        (Record, Record),
    ]
    assert not any(alike(a, b) for a, b in different)
    assert alike(Encoding({"a": x}, "b"), Encoding({"a": x}, "b"))
    assert alike(None, None)


def test_replaced_leaves_what_came_alone() -> None:
    batch = [Record(torch.ones(1), torch.ones(1)), {"a": Encoding({"x": torch.ones(1)})}, "text"]
    other = replaced(batch, torch.neg)
    assert [part.item() for part in tensors_in(other)] == [-1.0] * 3
    assert [part.item() for part in tensors_in(batch)] == [1.0] * 3
    assert other[2] == "text"


def test_batches_that_differ_in_numbers_only_are_flattened_alike():
    @dataclass
    class Numbered:
        x: Tensor
        n: float

    alike = [
        (torch.ones(2), torch.zeros(2)),
        ({"x": torch.ones(2), "n": (1, "a", None)}, {"x": torch.zeros(2), "n": (1, "a", None)}),
        (Numbered(torch.ones(2), 0.0), Numbered(torch.zeros(2), 0.0)),
        (UserDict(x=[torch.ones(2)]), UserDict(x=[torch.zeros(2)])),
        (Encoding({"x": torch.ones(2)}, "a"), Encoding({"x": torch.zeros(2)}, "a")),
    ]
    others = [
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2).double()),
        ({"x": 1}, {"y": 1}),
        ([1], (1,)),
        ([1], [True]),
        ([0.0], [-0.0]),
        (Numbered(torch.ones(2), 0.0), Numbered(torch.ones(2), 1.0)),
        (Encoding({"x": torch.ones(2)}, "a"), Encoding({"x": torch.ones(2)}, "b")),
        (Encoding({"x": torch.ones(2)}), UserDict({"x": torch.ones(2)})),
    ]
    for a, b in alike:
        assert flattened(a).rest == flattened(b).rest is not None
        hash(flattened(a).rest)
    for a, b in others:
        assert flattened(a).rest != flattened(b).rest


class Own(Tensor):
    """A tensor of another kind."""


@pytest.mark.parametrize(
    "batch",
    [[object()], torch.ones(2).to_sparse(), np.ones(2), [torch.ones(2).as_subclass(Own)], Encoding({"x": 1}, [2])],
)
def test_what_else_a_batch_may_hold_cannot_be_told_apart(batch):
    assert flattened(batch).rest is None


@pytest.mark.parametrize("sizes", [(3, 1), (1, 3), (2, 3)])
def test_stacks_of_other_sizes_are_not_broadcast(sizes: tuple[int, int]) -> None:
    first, second = (torch.ones(size, 2) for size in sizes)
    with pytest.raises(ValueError, match="a stack"):
        vectorized(lambda a, b: (a + b).sum(), first, second, randomness="same")


def test_the_core_of_vmap_is_vmap() -> None:
    x, y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.arange(3.0)
    found = vectorized(lambda x, y: (x.sum() * y, {"x": x, "constant": torch.ones(2)}), x, y, randomness="same")
    expected = torch.func.vmap(lambda x, y: (x.sum() * y, {"x": x, "constant": torch.ones(2)}))(x, y)
    torch.testing.assert_close(found, expected)


def test_a_vmap_by_hand_ends_with_its_context():
    with nested(2, "different") as outer, nested(3, "same") as inner:
        assert (outer, inner) == (1, 2)
        x = torch._C._functorch._add_batch_dim(torch.ones(3, 4), 0, inner)
        assert x.shape == (4,)
    assert not torch._C._are_functorch_transforms_active()
