"""Numbered batches: losses see the batch alone, a strategy its number, however it has come to the estimate."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, TensorDataset

from lightning_bilevel import (
    SGD,
    BilevelModule,
    Episode,
    EpisodeLoader,
    FirstOrder,
    NumberedBatch,
    audit,
    bilevel_data,
    numbered,
)
from lightning_bilevel.data.inputs import check_episodes
from lightning_bilevel.data.numbered import Place, PlacedBatches, places_of
from lightning_bilevel.host import move_data_to_device
from tests.support.modules import trainer

ONES = torch.ones(2)


class Watching(BilevelModule):
    """Whose losses want plain batches."""

    def __init__(self) -> None:
        super().__init__(inner_steps=1)
        self.theta, self.phi = (torch.nn.Parameter(torch.ones(())) for _ in range(2))

    def outer_parameters(self):
        return [self.phi]

    def inner_loss(self, batch):
        (x,) = batch
        return (self.theta - self.phi * x.mean()).square()

    def outer_loss(self, batch):
        (x,) = batch
        return (self.theta - x.mean()).square() + self.phi.square()

    def configure_inner_optimizer(self):
        return SGD(0.1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.outer_parameters(), lr=0.1)


class Hooked(Watching):
    """Whose batch hook wants a plain batch, too."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        (x,) = batch
        return (2 * x,)


class Places(FirstOrder):
    """Notes the places of what it estimates on."""

    seen: list[Any] = []  # noqa: RUF012

    def estimate(self, problem, carry, phi, episode, call):
        self.seen.append(places_of(episode))
        assert type(episode.outer) in (list, tuple)
        return super().estimate(problem, carry, phi, episode, call)


def loader(first: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(first, first + 6.0)), batch_size=2)


def shuffled(**options: Any) -> EpisodeLoader:
    inner, outer = (DataLoader(numbered(loader(first)), batch_size=None, shuffle=True, **options) for first in (0, 10))
    return EpisodeLoader(inner, outer, inner_batches=2, seed=1)


def in_lists() -> EpisodeLoader:
    return EpisodeLoader(numbered(loader(0)), numbered(loader(10)), inner_batches=2)


def workers() -> EpisodeLoader:
    return shuffled(num_workers=1)


def mapping() -> dict[str, Any]:
    return {level: DataLoader(numbered(loader(0)), batch_size=None) for level in ("inner", "outer")}


@pytest.mark.parametrize(
    ("module", "data", "precision"),
    [
        *(
            (module, data, "32-true")
            for module in (Watching, Hooked)
            for data in (shuffled, in_lists, mapping, workers)
        ),
        *((Hooked, shuffled, precision) for precision in ("64-true", "bf16-mixed")),
    ],
)
def test_numbers_come_through_a_fit(module, data, precision: Any) -> None:
    Places.seen.clear()
    trainer(Places(), precision=precision).fit(module(), data())
    inner, outer = zip(*Places.seen, strict=True)
    assert sorted(place.number for place in outer) == [0, 1, 2]
    assert {place.of for places in inner for place in places} == {3}
    assert sorted(place.number for places in inner for place in places) == sorted([0, 1, 2] * len(inner[0]))


def test_numbers_stay_with_their_batches() -> None:
    plain, batches = list(loader(0)), numbered(loader(0))
    assert [(each.number, each.of) for each in batches] == [(0, 3), (1, 3), (2, 3)]
    for episode in shuffled():
        for batch in episode.inner:
            assert torch.equal(batch.batch[0], plain[batch.number][0])
    assert all(torch.equal(each.batch[0], batch[0]) for each, batch in zip(batches, plain, strict=True))


def test_checked_episodes_have_plain_batches() -> None:
    one, two = (NumberedBatch([ONES, ONES], number, 2) for number in range(2))
    for given, inner, outer in (
        (Episode([two, one], one), (Place(1, 2), Place(0, 2)), Place(0, 2)),
        (Episode(two, one.batch), (Place(1, 2),), None),
        (Episode([[ONES, ONES], two], one.batch), (None, Place(1, 2)), None),
        (Episode([[ONES, ONES]], two), (None,), Place(1, 2)),
    ):
        (checked,) = check_episodes([given], "Net")
        assert places_of(checked) == (inner, outer)
        assert all(type(batch) is list for batch in [*checked.inner, checked.outer])
        assert places_of(*check_episodes([checked], "Net")) == (inner, outer)  # of an episode that was checked
    (checked,) = check_episodes([Episode([[ONES, ONES]], [ONES, ONES])], "Net")
    assert type(checked.inner) is not PlacedBatches


def test_adapted_takes_numbered_batches() -> None:
    plain, again = Watching(), Watching()
    batches = numbered(loader(0))
    with plain.adapted([each.batch for each in batches]), again.adapted(batches):
        assert torch.equal(plain.theta, again.theta)


@pytest.mark.parametrize(("number", "of"), [(2, 2), (-1, 2), (torch.tensor(0), 2), (True, 2), (0, 2.0)])
def test_numbers_are_refused(number: Any, of: Any) -> None:
    with pytest.raises(ValueError, match=r"^Expected `NumberedBatch\(number=..., of=...\)` to be integers wi"):
        check_episodes([Episode([NumberedBatch(ONES, number, of)], ONES)], "Net")


def test_batches_are_not_collated() -> None:
    with pytest.raises(ValueError, match=r"^Expected `DataLoader\(batch_size=...\)` to be None for a data set of num"):
        next(iter(DataLoader(numbered(loader(0)))))


def test_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Expected `numbered\(batches\)` to be a loader of one or more"):
        numbered([])


def test_placed_batches_are_a_list_to_others(tmp_path) -> None:
    places = PlacedBatches([ONES], [Place(1, 2)], Place(0, 3))
    episode = Episode(places, ONES)
    for again in (pickle.loads(pickle.dumps(episode)), copy.deepcopy(episode), tree_map(lambda leaf: leaf, episode)):
        assert places_of(again) == ((Place(1, 2),), Place(0, 3))
    assert len(tree_leaves(episode)) == 2
    moved = move_data_to_device(episode, torch.device("cpu"))
    assert (type(moved.inner), places_of(moved)) == (PlacedBatches, ((None,), None))


def test_an_audit_takes_numbered_batches() -> None:
    one, two, three = numbered(loader(0))
    report = audit(Watching(), Episode([one, two], three), [Places()], verbose=False)
    assert report.vectorizes  # without their numbers, batches can be stacked
    assert report["Places"].works


class Hooking(pl.LightningDataModule):
    """A data module whose batch hook wants plain batches."""

    def train_dataloader(self):
        return DataLoader(numbered(loader(0)), batch_size=None, shuffle=True)

    def val_dataloader(self):
        return DataLoader(numbered(loader(10)), batch_size=None)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        (x,) = batch
        return (3 * x,)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_numbers_come_through_a_data_module() -> None:
    Places.seen.clear()
    trainer(Places()).fit(Watching(), datamodule=bilevel_data(Hooking()))
    assert sorted(outer.number for _, outer in Places.seen) == [0, 1, 2]
