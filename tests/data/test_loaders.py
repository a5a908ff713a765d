"""Episodes: what is in them, Lightning's limits and hooks, their randomness, and what is refused."""

from __future__ import annotations

import itertools
import multiprocessing
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_bilevel.data import loaders
from lightning_bilevel.data.loaders import EpisodeLoader
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.host import DistributedSamplerWrapper
from lightning_bilevel.problem import Episode
from tests.support.loaders import (
    UNUSUAL,
    Noisy,
    Recorder,
    Seen,
    Unsized,
    contents,
    fit,
    make_plain,
    make_trainer,
    numbers,
    sharded,
)

pytestmark = UNUSUAL

# What an episode is made of


def test_an_epoch_is_a_pass_over_outer_and_inner_goes_round() -> None:
    loader = EpisodeLoader(numbers(3, shuffle=False), numbers(4, 2, shuffle=False), inner_batches=2)
    epochs = [[contents(episode) for episode in loader] for _ in range(2)]
    assert epochs == [
        [([[0.0], [1.0]], [0.0, 1.0]), ([[2.0], [0.0]], [2.0, 3.0])],
        [([[1.0], [2.0]], [0.0, 1.0]), ([[0.0], [1.0]], [2.0, 3.0])],
    ]


def test_a_trainer_sees_what_a_loop_sees() -> None:
    def make() -> EpisodeLoader:
        return EpisodeLoader(numbers(5), numbers(6, 2), inner_batches=2, seed=3)

    loader = make()
    by_hand = [contents(episode) for _ in range(3) for episode in loader]
    module = fit(make(), max_epochs=3)
    assert module.seen == by_hand
    assert module.places == list(itertools.product(range(3), range(3)))


def test_shuffled_passes_cover_the_data_and_differ() -> None:
    loader = EpisodeLoader(numbers(6), numbers(6), inner_batches=2)
    epochs = [[contents(episode) for episode in loader] for _ in range(2)]
    outer = [[values[0] for _, values in epoch] for epoch in epochs]
    inner = [batch[0] for epoch in epochs for batches, _ in epoch for batch in batches]
    passes = [*outer, *(inner[start : start + 6] for start in range(0, 24, 6))]
    assert all(sorted(order) == [0, 1, 2, 3, 4, 5] for order in passes)
    assert len({tuple(order) for order in passes}) == 6


def test_lists_are_lists_of_batches() -> None:
    inner, outer = [torch.zeros(1), torch.ones(1)], [torch.full((2,), 5.0)]
    assert fit(EpisodeLoader(inner, outer, inner_batches=3), max_epochs=2).seen == [
        ([[0.0], [1.0], [0.0]], [5.0, 5.0]),
        ([[1.0], [0.0], [1.0]], [5.0, 5.0]),
    ]


def test_one_loader_in_both_places() -> None:
    loader = numbers(4)
    episodes = [contents(episode) for episode in EpisodeLoader(loader, loader, inner_batches=2, seed=1)]
    inner, outer = [batches[0] for batches, _ in episodes], [batch for _, batch in episodes]
    assert sorted(outer) == [[0], [1], [2], [3]]
    assert inner != outer


def test_length() -> None:
    loader = EpisodeLoader(numbers(3), numbers(7, 2))
    assert len(loader) == 4
    loader.limits = 3
    assert len(loader) == 3


def test_an_outer_loader_without_length_has_none_here() -> None:
    loader = EpisodeLoader(numbers(3), DataLoader(Unsized(4)))
    with pytest.raises(TypeError, match=r"^`EpisodeLoader\(outer=\.\.\.\)` has no length"):
        len(loader)
    assert len(list(loader)) == 4


@pytest.mark.parametrize("outer", [["a", "b"], DataLoader(["a", "b"], None), Unsized(2, False)], ids=type)
def test_leaving_an_epoch_early_begins_another_pass(outer: Any) -> None:
    first, second = outer
    loader = EpisodeLoader([1, 2, 3], outer)
    assert next(iter(loader)) == Episode([1], first)
    assert list(loader) == [Episode([2], first), Episode([3], second)]


def test_leaving_an_epoch_early_after_a_resumed_one() -> None:
    loader, resumed = (EpisodeLoader([1], ["a", "b", "c"]) for _ in range(2))
    assert [next(loader).outer for loader in [iter(loader)] * 2] == ["a", "b"]
    resumed._load_state_dicts(loader._state_dicts())
    assert [episode.outer for episode in resumed] == ["c"]
    assert [next(iter(resumed)).outer for _ in range(2)] == ["a", "a"]


# Lightning's arguments


@pytest.mark.parametrize(
    ("kwargs", "batches"),
    [
        ({"limit_train_batches": 3}, 3),
        ({"limit_train_batches": 0.5}, 2),
        ({"limit_train_batches": 1.0}, 4),
        ({"accumulate_grad_batches": 3}, 4),
        ({"reload_dataloaders_every_n_epochs": 1}, 4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_under_limits(kwargs: dict[str, Any], batches: int, workers: int) -> None:
    module = fit(EpisodeLoader(numbers(6), numbers(8, 2, num_workers=workers), 2), max_epochs=2, **kwargs)
    assert module.places == list(itertools.product(range(2), range(batches)))


def test_limited_epochs_are_shuffled_anew() -> None:
    seen = fit(EpisodeLoader(numbers(3), numbers(50)), max_epochs=3, limit_train_batches=5).seen
    assert len({tuple(batch) for _, batch in seen}) > 5


def test_fast_dev_run() -> None:
    assert len(fit(EpisodeLoader(numbers(6), numbers(8)), fast_dev_run=2).seen) == 2


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
def test_overfitting_repeats_the_first_batches() -> None:
    seen = fit(EpisodeLoader(numbers(4), numbers(8), 2), max_epochs=3, overfit_batches=2).seen
    assert [outer for _, outer in seen] == [[0.0], [1.0]] * 3
    assert [inner for inner, _ in seen] == [[[0.0], [1.0]], [[2.0], [3.0]]] * 3


def test_unsized_outer_loader() -> None:
    module = fit(EpisodeLoader(numbers(3), DataLoader(Unsized(4))), max_epochs=2)
    assert module.places == list(itertools.product(range(2), range(4)))
    assert fit(EpisodeLoader(DataLoader(Unsized(3)), numbers(4), 2), max_epochs=1).places == module.places[:4]
    limited = fit(EpisodeLoader(numbers(3), DataLoader(Unsized(4))), max_epochs=2, limit_train_batches=3)
    assert limited.places == list(itertools.product(range(2), range(3)))


def test_an_episode_read_ahead_is_not_lost() -> None:
    """Lightning reads one ahead without a length, and drops it when ``on_train_batch_start`` cuts the epoch short."""
    inner = [torch.tensor([float(i)]) for i in range(7)]
    sized = fit(EpisodeLoader(inner, numbers(4, shuffle=False)), max_epochs=3, skip_from=2)
    unsized = fit(EpisodeLoader(inner, DataLoader(Unsized(4, shuffle=False))), max_epochs=3, skip_from=2)
    assert sized.places == list(itertools.product(range(3), range(2)))
    assert [inner for inner, _ in sized.seen] == [[[i]] for i in (0, 1, 3, 4, 6, 0)]
    assert unsized.seen == sized.seen


def test_validation_in_the_middle_of_an_epoch() -> None:
    val = EpisodeLoader([torch.zeros(1)] * 3, [torch.ones(1)] * 2, inner_batches=2)
    module = fit(EpisodeLoader(numbers(6), numbers(8, 2)), val=val, max_epochs=1, val_check_interval=0.5)
    assert module.evaluated == 2 * [(0, ([[0.0], [0.0]], [1.0])), (1, ([[0.0], [0.0]], [1.0]))]
    assert len(module.seen) == 4


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("limit", [1.0, 3])
def test_evaluation_on_episodes(stage: str, limit: float) -> None:
    for outer in (numbers(4, shuffle=False), DataLoader([torch.tensor(float(i)) for i in range(4)])):
        module = Recorder()
        trainer = make_trainer(limit_val_batches=limit, limit_test_batches=limit)
        getattr(trainer, stage)(module, EpisodeLoader(numbers(3, shuffle=False), outer), verbose=False)
        expected = [(0, ([[0]], [0])), (1, ([[1]], [1])), (2, ([[2]], [2])), (3, ([[0]], [3]))]
        assert module.evaluated == expected[: 4 if limit == 1.0 else 3]


def test_workers_are_shut_down() -> None:
    before = set(multiprocessing.active_children())
    inner, outer = numbers(8, num_workers=1, persistent_workers=True), numbers(8, num_workers=1)
    loader = EpisodeLoader(inner, outer)
    episodes = iter(loader)
    next(episodes)
    assert len(set(multiprocessing.active_children()) - before) == 2
    loader.reset()
    assert set(multiprocessing.active_children()) == before
    fit(loader, max_steps=3)
    assert set(multiprocessing.active_children()) == before


def test_a_loader_goes_on_after_a_trainer() -> None:
    by_hand = EpisodeLoader(numbers(5), numbers(4), seed=3)
    expected = [contents(episode) for _ in range(3) for episode in by_hand]
    loader = EpisodeLoader(numbers(5), numbers(4), seed=3)
    seen = fit(loader, max_epochs=1).seen
    assert seen + [contents(episode) for episode in loader] + fit(loader, max_epochs=1).seen == expected


# RngState


def test_generators_are_left_as_they_were() -> None:
    generators = [torch.default_generator, *(torch.Generator().manual_seed(seed) for seed in range(3))]
    _, own, in_sampler, wrapped = generators
    wrapper = DistributedSamplerWrapper(SubsetRandomSampler(range(4), wrapped), num_replicas=1, rank=0)
    for inner in (
        DataLoader(Noisy(4), shuffle=True),
        numbers(4, generator=own),
        DataLoader(Noisy(4), batch_sampler=BatchSampler(RandomSampler(range(4), generator=in_sampler), 2, False)),
        DataLoader(Noisy(4), sampler=wrapper),
    ):
        before = [generator.get_state() for generator in generators]
        assert len(list(EpisodeLoader(inner, range(4), 2))) == 4
        after = [generator.get_state() for generator in generators]
        assert all(map(torch.equal, before, after))
    assert [generator.initial_seed() for generator in generators[1:]] == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_fixes_the_data(workers: int) -> None:
    def read(global_seed: int, draws: int = 0, seed: int | None = None, own: int | None = None, rank: int = 0) -> Seen:
        seed_everything(global_seed, verbose=False)
        torch.rand(draws)
        generator = None if own is None else torch.Generator().manual_seed(own)
        outer = DataLoader(Noisy(20), 10, shuffle=True, num_workers=workers, generator=generator)
        loader = EpisodeLoader([torch.zeros(1)], outer, seed=seed)
        loader.rank = rank
        return [contents(episode) for episode in loader]

    assert read(1) == read(1, draws=3) != read(2)
    assert read(1, seed=7) == read(2, seed=7) != read(1, seed=8)
    assert read(1, own=7) == read(2, own=7) != read(1, own=8)
    assert read(1, rank=0) != read(1, rank=1)


def test_a_distributed_sampler_keeps_its_seed() -> None:
    loader = sharded()
    seed = loader.sampler.seed
    orders = [[contents(episode) for episode in EpisodeLoader([torch.zeros(1)], loader)] for _ in range(2)]
    assert orders[0] == orders[1]
    assert loader.sampler.seed == seed


def test_inner_and_outer_are_shuffled_differently() -> None:
    episodes = [contents(episode) for episode in EpisodeLoader(numbers(20), numbers(20))]
    assert [inner for (inner,), _ in episodes] != [outer for _, outer in episodes]


def test_samplers_and_datasets_are_told_the_pass() -> None:
    told: list[tuple[str, int]] = []

    class Batches(BatchSampler):
        def set_epoch(self, epoch: int) -> None:
            told.append(("sampler", epoch))

    class Data(Noisy):
        def set_epoch(self, epoch: int) -> None:
            told.append(("dataset", epoch))

    loader = EpisodeLoader(DataLoader(Data(2), batch_sampler=Batches(RandomSampler(range(2)), 1, False)), [0, 1, 2], 2)
    assert len(list(loader)) == 3
    assert sorted(told) == [("dataset", 0), ("dataset", 1), ("dataset", 2), *(("sampler", i) for i in range(3))]


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_a_distributed_sampler(workers: int) -> None:
    """What Lightning puts into the loader under ``strategy="ddp"``."""
    data = TensorDataset(torch.arange(8.0))
    seen = []
    for rank in range(2):
        loader = EpisodeLoader(numbers(8), numbers(8), inner_batches=2)
        loader.rank = rank
        loader.flattened = [
            DataLoader(data, sampler=DistributedSampler(data, 2, rank), num_workers=workers) for _ in range(2)
        ]
        seen.append([contents(episode) for _ in range(2) for episode in loader])
    (inner_0, outer_0), (inner_1, outer_1) = (tuple(zip(*shard, strict=True)) for shard in seen)
    for epoch in (slice(0, 4), slice(4, 8)):
        assert sorted(outer_0[epoch] + outer_1[epoch]) == [[float(i)] for i in range(8)]
    assert outer_0[:4] != outer_0[4:]
    assert [inner for inner, _ in inner_0] != list(outer_0)
    passes = [[batch for pair in inner for batch in pair] for inner in (inner_0, inner_1)]
    for start in range(0, 16, 4):
        assert sorted(passes[0][start : start + 4] + passes[1][start : start + 4]) == [[float(i)] for i in range(8)]
    assert len({str(passes[0][start : start + 4]) for start in range(0, 16, 4)}) > 1


def test_ranks_deal_out_one_shuffle_of_a_wrapped_sampler() -> None:
    data, seen = TensorDataset(torch.arange(8.0)), []
    for rank in range(2):
        sampler = DistributedSamplerWrapper(SubsetRandomSampler(range(8)), num_replicas=2, rank=rank)
        loader = EpisodeLoader([torch.zeros(1)], DataLoader(data, sampler=sampler), seed=1)
        loader.rank = rank
        seen += [contents(episode)[1] for episode in loader]
    assert sorted(seen) == [[float(i)] for i in range(8)]


@pytest.mark.parametrize("make_outer", [lambda: numbers(4), lambda: DataLoader(Unsized(4))], ids=["sized", "unsized"])
def test_the_strategy_says_whose_data(monkeypatch: pytest.MonkeyPatch, make_outer: Callable[[], DataLoader]) -> None:
    monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", {"num_replicas": 8, "rank": 5})
    loader = EpisodeLoader(numbers(5), make_outer(), seed=3)
    loader.rank = 5
    expected = [contents(episode) for _ in range(2) for episode in loader]
    assert fit(EpisodeLoader(numbers(5), make_outer(), seed=3), max_epochs=2).seen == expected


def test_the_process_group_says_whose_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> Seen:
        return [contents(episode) for episode in EpisodeLoader(numbers(5), numbers(9), seed=3)]

    alone = read()
    group = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: 1)
    monkeypatch.setattr(loaders, "distributed", group)
    assert read() != alone


# Other loaders


def test_other_loaders_are_left_alone() -> None:
    class Plain(Recorder):
        def training_step(self, batch: Any) -> Tensor:
            return self.weight * 1.0

    make_trainer(max_epochs=1).fit(Plain(), numbers(3))


# Refused


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_inner_batches_is_checked(value: Any) -> None:
    message = f"Expected `EpisodeLoader(inner_batches=...)` to be a positive integer, got {value!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        EpisodeLoader([1], [2], inner_batches=value)


@pytest.mark.parametrize("inner", [[], numbers(2, 3, drop_last=True), iter(())], ids=["list", "drop_last", "iterator"])
@pytest.mark.filterwarnings("ignore:`list` returned 0 length", "ignore:Total length of `.*` across ranks is zero")
@pytest.mark.filterwarnings("ignore:`DataLoader` returned 0 length")
def test_an_inner_loader_without_batches(inner: Any) -> None:
    match = r"^Expected `EpisodeLoader\(inner=\.\.\.\)` to be an iterable of 1 or more batches in every pass, got 0"
    with pytest.raises(ValueError, match=match):
        list(EpisodeLoader(inner, [torch.zeros(1)]))
    with pytest.raises(ValueError, match=match):
        fit(EpisodeLoader(inner, [torch.zeros(1)]), max_epochs=1)


def test_an_iterator_that_is_used_up() -> None:
    match = r"^Expected `EpisodeLoader\(inner=\.\.\.\)` to be an iterable of 1 or more batches in every pass, got 0"
    with pytest.raises(ValueError, match=match):
        list(EpisodeLoader(iter([1, 2]), [0, 1, 2]))
    loader = EpisodeLoader([1], iter([1, 2]))
    assert len(list(loader)) == 2
    with pytest.raises(ValueError, match=r"^Expected `EpisodeLoader\(outer=\.\.\.\)` to be an iterable of 1 or more"):
        list(loader)


def test_one_loader_with_persistent_workers_in_both_places() -> None:
    loader = numbers(4, num_workers=1, persistent_workers=True)
    with pytest.raises(MisconfigurationError, match="^Cannot use one loader with `persistent_workers=True`"):
        EpisodeLoader(loader, loader)


def test_prediction_is_not_for_episodes() -> None:
    class Predicting(Recorder):
        def forward(self, batch: Any) -> Any:
            return batch

    with pytest.raises(ValueError, match=r"^`trainer\.predict\(\)` only supports"):
        make_trainer().predict(Predicting(), make_plain())
