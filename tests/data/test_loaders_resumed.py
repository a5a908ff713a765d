"""Resumed epochs go on, episode by episode, as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import seed_everything
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from lightning_bilevel.data.loaders import EpisodeLoader
from lightning_bilevel.errors import MisconfigurationError
from tests.support.fits import SaveAt
from tests.support.loaders import (
    UNUSUAL,
    Noisy,
    NoisyEverywhere,
    Recorder,
    Seen,
    Unsized,
    fit,
    make_plain,
    make_trainer,
    numbers,
    sharded,
)

pytestmark = UNUSUAL


def weighted(generator: torch.Generator | None = None) -> DataLoader:
    sampler = WeightedRandomSampler([1.0, 2.0, 3.0, 4.0], 8, generator=generator)
    return DataLoader(TensorDataset(torch.arange(4.0)), 2, sampler=sampler)


def shared_generator() -> EpisodeLoader:
    own = torch.Generator().manual_seed(random.randrange(1000))
    return EpisodeLoader(numbers(5, generator=own), weighted(own), 2)


def make_workers(**kwargs: Any) -> EpisodeLoader:
    return EpisodeLoader(numbers(5, num_workers=1, **kwargs), numbers(8, 2, num_workers=2, **kwargs), 2)


def make_unsized() -> EpisodeLoader:
    return EpisodeLoader(DataLoader(Unsized(5)), DataLoader(Unsized(8), 2), 2)


LOADERS: dict[str, Callable[[], EpisodeLoader]] = {
    "map-style": make_plain,
    "given seed": lambda: EpisodeLoader(numbers(5), numbers(8, 2), 2, seed=random.randrange(1000)),
    "workers": make_workers,
    "persistent workers": lambda: make_workers(persistent_workers=True),
    "iterable": make_unsized,
    "iterable, workers": lambda: EpisodeLoader(numbers(5), DataLoader(Unsized(4), 2, num_workers=2), 2),
    "sampler": lambda: EpisodeLoader(weighted(), weighted(), 2),
    "own generator": shared_generator,
    "own generator, workers": lambda: EpisodeLoader(
        numbers(5), numbers(8, 2, num_workers=2, generator=torch.Generator().manual_seed(random.randrange(1000))), 2
    ),
    "distributed sampler": lambda: EpisodeLoader(sharded(), sharded(), 2),
    "replacement": lambda: EpisodeLoader(
        numbers(5), DataLoader(TensorDataset(torch.arange(4.0)), 20, sampler=RandomSampler(range(4), True, 80)), 2
    ),
    "random transform": lambda: EpisodeLoader(DataLoader(Noisy(5), shuffle=True), DataLoader(Noisy(8), 2), 2),
    "random transform, workers": lambda: EpisodeLoader(
        DataLoader(Noisy(5), shuffle=True), DataLoader(NoisyEverywhere(8), 2, num_workers=2), 2
    ),
}


def assert_resumes(
    path: Path,
    make: Callable[[], EpisodeLoader],
    batches: int = 6,
    save: str = "on_train_batch_end",
    until: dict[str, int] | None = None,
    **kwargs: Any,
) -> tuple[Recorder, Recorder]:
    """Check that a run saved after so many batches and resumed under other seeds sees what was to come."""
    until = until or {"max_epochs": 3}
    seed_everything(1, verbose=False)
    whole = fit(make(), callbacks=[SaveAt(path, batches, save)], **until, **kwargs)
    seed_everything(2, verbose=False)
    rest = fit(make(), ckpt_path=path, **until, **kwargs)
    assert len(whole.seen) > batches
    assert rest.seen == whole.seen[batches:]
    assert rest.seen != whole.seen[: len(rest.seen)]
    return whole, rest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "resume.ckpt"


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_resume_in_the_middle_of_an_epoch(path: Path, make: Callable[[], EpisodeLoader]) -> None:
    whole, rest = assert_resumes(path, make)
    assert rest.places == whole.places[6:]


@pytest.mark.parametrize("make", [make_plain, make_unsized], ids=["sized", "unsized"])
@pytest.mark.parametrize("batches", range(1, 9))
def test_resume_after_each_batch(path: Path, make: Callable[[], EpisodeLoader], batches: int) -> None:
    assert_resumes(path, make, batches)


@pytest.mark.parametrize("make", [make_plain, make_unsized], ids=["sized", "unsized"])
@pytest.mark.parametrize("until", [{"max_epochs": 3}, {"max_steps": 10}], ids=str)
@pytest.mark.parametrize("save", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
def test_resume_at_the_end_of_an_epoch(
    path: Path, make: Callable[[], EpisodeLoader], until: dict[str, int], save: str
) -> None:
    assert_resumes(path, make, 4, save, until, val=[torch.zeros(1)])
    if save != "on_validation_end":
        assert_resumes(path, make, 4, save, until)


@pytest.mark.parametrize("make", [make_plain, make_unsized], ids=["sized", "unsized"])
@pytest.mark.parametrize("stop", [{"max_steps": 3}, {"max_steps": 4}, {"max_epochs": 1}, {"max_epochs": 2}], ids=str)
def test_resume_a_finished_run(path: Path, make: Callable[[], EpisodeLoader], stop: dict[str, int]) -> None:
    longer = {key: 3 * value for key, value in stop.items()}
    seed_everything(1, verbose=False)
    whole = fit(make(), **longer)
    seed_everything(1, verbose=False)
    first, trainer = Recorder(), make_trainer(**stop)
    trainer.fit(first, make())
    trainer.save_checkpoint(path)
    seed_everything(2, verbose=False)
    assert first.seen + fit(make(), ckpt_path=path, **longer).seen == whole.seen


@pytest.mark.parametrize(
    "kwargs",
    [
        {"limit_train_batches": 3},
        {"limit_train_batches": 0.5},
        {"accumulate_grad_batches": 3},
        {"reload_dataloaders_every_n_epochs": 1},
        {"val": EpisodeLoader([torch.zeros(1)], [torch.zeros(1)] * 2), "val_check_interval": 2},
    ],
    ids=lambda kwargs: ", ".join(kwargs),
)
@pytest.mark.parametrize("batches", [2, 3, 5])
def test_resume_under_arguments_of_the_trainer(path: Path, kwargs: dict[str, Any], batches: int) -> None:
    assert_resumes(path, make_plain, batches, **kwargs)
    if kwargs.get("limit_train_batches") != 0.5:
        assert_resumes(path, make_unsized, batches, **kwargs)


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
def test_resume_overfitting(path: Path) -> None:
    assert_resumes(path, make_plain, 3, overfit_batches=2)


def test_resume_twice(path: Path) -> None:
    seed_everything(1, verbose=False)
    whole = fit(make_plain(), max_epochs=3, callbacks=[SaveAt(path, 3, "on_train_batch_end")])
    fit(make_plain(), max_epochs=3, ckpt_path=path, callbacks=[SaveAt(path, 4, "on_train_batch_end")])
    assert fit(make_plain(), max_epochs=3, ckpt_path=path).seen == whole.seen[7:]


def test_resume_when_the_scheduler_asks_for_the_number_of_steps(path: Path) -> None:
    class Scheduled(Recorder):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            assert self.trainer.estimated_stepping_batches == 12
            return super().configure_optimizers()

    seed_everything(1, verbose=False)
    whole, rest = Scheduled(), Scheduled()
    make_trainer(max_epochs=3, callbacks=[SaveAt(path, 6, "on_train_batch_end")]).fit(whole, make_plain())
    make_trainer(max_epochs=3).fit(rest, make_plain(), ckpt_path=path)
    assert rest.seen == whole.seen[6:]


def test_resume_with_a_new_loader_each_epoch(path: Path) -> None:
    class Reloading(Recorder):
        def train_dataloader(self) -> EpisodeLoader:
            return EpisodeLoader(numbers(5), numbers(8, 2), 2, seed=self.current_epoch)

    whole, rest = Reloading(), Reloading()
    often = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
    make_trainer(**often, callbacks=[SaveAt(path, 6, "on_train_batch_end")]).fit(whole)
    make_trainer(**often).fit(rest, ckpt_path=path)
    assert rest.seen == whole.seen[6:]
    assert len({str(whole.seen[start : start + 4]) for start in (0, 4, 8)}) == 3


def test_what_prepare_episodes_is_for(path: Path) -> None:
    """Without it, Lightning gives back a position within an epoch, and not one at its end."""

    class Unprepared(Recorder):
        def on_train_start(self) -> None:
            pass

    def run(batches: int, save: str) -> tuple[Seen, Seen]:
        seed_everything(1, verbose=False)
        whole, rest = Unprepared(), Unprepared()
        make_trainer(max_epochs=2, callbacks=[SaveAt(path, batches, save)]).fit(whole, make_plain())
        make_trainer(max_epochs=2).fit(rest, make_plain(), ckpt_path=path)
        return whole.seen[batches:], rest.seen

    expected, seen = run(3, "on_train_batch_end")
    assert seen == expected
    expected, seen = run(4, "on_train_epoch_end")
    assert seen != expected


def test_a_checkpoint_can_be_read_without_unpickling(path: Path) -> None:
    fit(make_workers(), max_epochs=1, callbacks=[SaveAt(path, 3, "on_train_batch_end")])
    state = torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert {name: each["position"] for name, each in state[0].items()} == {"outer": (0, 3), "inner": (1, 1)}


def test_data_that_shrank_since_the_checkpoint(path: Path) -> None:
    fit(EpisodeLoader(numbers(8), numbers(8)), max_epochs=1, callbacks=[SaveAt(path, 6, "on_train_batch_end")])
    match = r"^Expected `EpisodeLoader\(inner=\.\.\.\)` to be an iterable of 6 or more batches in every pass, got 5"
    with pytest.raises(ValueError, match=match):
        fit(EpisodeLoader(numbers(5), numbers(8)), max_epochs=1, ckpt_path=path)


def test_a_checkpoint_of_another_loader() -> None:
    with pytest.raises(MisconfigurationError, match="^Cannot use this checkpoint with `EpisodeLoader`"):
        make_plain()._load_state_dicts([{"_index_sampler_state": None}])
