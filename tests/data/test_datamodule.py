"""An existing LightningDataModule as the data of both levels."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from lightning_bilevel import SGD, Episode, EpisodeLoader, ReverseUnroll, bilevel, bilevel_data
from lightning_bilevel.errors import MisconfigurationError
from tests.support.fits import SaveAt
from tests.support.loaders import Recorder, Unsized, make_trainer, numbers, values
from tests.support.modules import trainer
from tests.support.wrapping import Minimal

pytestmark = pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")


class Numbers(LightningDataModule):
    """Numbers from 0 to train, from 100 to validate; notes what is called."""

    classes = 3

    def __init__(self, size: int = 6, batch_size: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.size, self.batch_size, self.calls, self.epochs = size, batch_size, [], 0

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {TrainerFn(stage).value}")
        self.batches = len(self.train_dataloader())

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {TrainerFn(stage).value}")

    def on_exception(self, exception: BaseException) -> None:
        self.calls.append(type(exception).__name__)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = state["epochs"]

    def train_dataloader(self) -> Any:
        return numbers(self.size, self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.arange(100.0, 104.0)), 2)

    test_dataloader = val_dataloader


class Watched(Recorder):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved = dict(checkpoint)

    def setup(self, stage: str) -> None:
        self.head = torch.nn.Linear(1, self.trainer.datamodule.classes)


def fit(data: Any, module: Recorder | None = None, **options: Any) -> Recorder:
    module = module or Watched()
    ckpt_path = options.pop("ckpt_path", None)
    make_trainer(**{"max_epochs": 1, "limit_val_batches": 0, **options}).fit(
        module, datamodule=data, ckpt_path=ckpt_path
    )
    return module


def read(module: Recorder) -> tuple[list[float], list[float]]:
    """Return the numbers of each level."""
    inner = [value for batches, _ in module.seen for batch in batches for value in batch]
    return inner, [value for _, batch in module.seen for value in batch]


def data_of(loader: Any) -> Numbers:
    data = Numbers()
    data.train_dataloader = lambda: loader
    return data


def test_training_loader_is_inner_and_validation_loader_outer() -> None:
    data = Numbers()
    module = fit(bilevel_data(data, inner_batches=3))
    inner, outer = read(module)
    assert sorted(inner) == [0, 1, 2, 3, 4, 5]
    assert outer == [100, 101, 102, 103]
    expected = EpisodeLoader(data.train_dataloader(), data.val_dataloader(), 3)
    module_of_loader = Recorder()
    fit(data_of(expected), module_of_loader)
    assert module.seen == module_of_loader.seen


def test_all_else_is_the_data_modules_own(tmp_path: Path) -> None:
    data = Numbers(batch_size=2)
    wrapped = bilevel_data(data, seed=3)
    assert isinstance(wrapped, Numbers)
    wrapped.epochs = 4
    module = fit(wrapped, callbacks=[SaveAt(tmp_path / "a.ckpt", 1, "on_train_batch_end")], limit_val_batches=1)
    assert data.calls == ["prepare_data", "setup fit", "teardown fit"]
    assert data.batches == 3  # its own methods have its own loader, which yields so many
    assert module.head.out_features == 3
    assert [index for index, _ in module.evaluated] == []
    assert module.saved["Numbers"] == {"epochs": 4}
    assert module.saved["datamodule_hyper_parameters"] == {"size": 6, "batch_size": 2}
    assert module.trainer.datamodule.trainer is data.trainer is module.trainer
    plain = Numbers()
    make_trainer().test(Watched(), datamodule=plain, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert plain.epochs == 4
    loaded = Numbers.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.batch_size == 2
    wrapped.batch_size = 5
    assert data.batch_size == 5
    del wrapped.batch_size
    assert not hasattr(data, "batch_size")


def test_an_exception_reaches_the_data_module() -> None:
    class Fails(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise KeyError(batch_idx)

    data = Numbers()
    with pytest.raises(KeyError):
        fit(bilevel_data(data), Fails())
    assert data.calls == ["prepare_data", "setup fit", "KeyError"]


def test_a_module_and_its_data_unedited() -> None:
    class Pairs(LightningDataModule):
        def setup(self, stage: str) -> None:
            torch.manual_seed(1)
            self.parts = [TensorDataset(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(2)]

        def train_dataloader(self) -> Any:
            return DataLoader(self.parts[0], 4, shuffle=True)

        def val_dataloader(self) -> Any:
            return DataLoader(self.parts[1], 4)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            x, y = batch
            return x / 2, y

    class Judged(Minimal):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.loss(batch))

    model = bilevel(Judged(), inner="head", outer="body", inner_optimizer=SGD(lr=0.1), inner_steps=2)
    engine = trainer(ReverseUnroll(), max_epochs=2)
    engine.fit(model, datamodule=bilevel_data(Pairs(), inner_batches=2))
    assert {"val", "outer_loss"} <= set(engine.callback_metrics)
    assert engine.global_step == 4


@pytest.mark.parametrize("several", [dict, list, CombinedLoader])
def test_several_training_loaders(several: Any) -> None:
    class Several(Numbers):
        def train_dataloader(self) -> Any:
            a, b = numbers(4), numbers(3, 2)
            return {dict: {"a": a, "b": b}, list: [a, b]}.get(several) or CombinedLoader((a, b), "min_size")

        def setup(self, stage: str) -> None:
            pass

    loader = bilevel_data(Several(), inner_batches=4).train_dataloader()
    passes = 2 if several is CombinedLoader else 1  # as long as the shortest, and as the longest
    (batches, _), _ = loader
    first = [values(batch["a"] if several is dict else batch[0]) for batch in batches]
    if passes == 1:
        assert sorted(first) == [[0], [1], [2], [3]]
    second = [values(batch["b"] if several is dict else batch[1]) for batch in batches]
    assert sorted(sum(second[:2], [])) == [0, 1, 2]

    class Notes(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(batch)
            return self.weight * 1.0

    with pytest.warns(UserWarning, match=r"^You requested to overfit but enabled train dataloader shuffling"):
        module = fit(bilevel_data(Several()), Notes(), overfit_batches=1)
    assert len(module.seen) == 1
    (batch,) = module.seen[0].inner
    assert values(batch["a"] if several is dict else batch[0]) == [0]


class SeveralJudges(Numbers):
    def val_dataloader(self) -> Any:
        loaders = [DataLoader(TensorDataset(torch.arange(start, start + 2.0)), 1) for start in (100, 200, 300)]
        return {"a": loaders[0], "b": loaders[1:]} if self.named else loaders

    named = False


def test_several_validation_loaders() -> None:
    _, outer = read(fit(bilevel_data(SeveralJudges())))
    assert outer == [100, 101, 200, 201, 300, 301]
    _, outer = read(fit(bilevel_data(SeveralJudges()), limit_train_batches=4))
    assert outer == [100, 101, 200, 201]
    _, outer = read(fit(bilevel_data(SeveralJudges(), val_loader=1)))
    assert outer == [200, 201]
    named = SeveralJudges()
    named.named = True
    _, outer = read(fit(bilevel_data(named, val_loader="b")))
    assert outer == [200, 201, 300, 301]
    for wrong in ("c", 2):
        with pytest.raises(
            ValueError, match=r"^Expected `bilevel_data\(val_loader=\.\.\.\)` to be one of \['a', 'b'\]"
        ):
            bilevel_data(named, val_loader=wrong).train_dataloader()


def test_split() -> None:
    def both(**options: Any) -> tuple[list[float], list[float]]:
        loader = bilevel_data(Numbers(10), split=0.3, inner_batches=7, **options).train_dataloader()
        episodes = list(loader)
        return [value for batch in episodes[0].inner for value in values(batch)], sorted(
            value for _, outer in episodes for value in values(outer)
        )

    inner, outer = both()
    assert len(outer) == 3
    assert sorted([*inner, *outer]) == list(range(10))
    assert inner != sorted(inner)  # shuffled, as its loader is
    assert both()[1] == outer
    assert both(seed=1)[1] != outer
    only = Numbers(10)
    only.val_dataloader = LightningDataModule.val_dataloader.__get__(only)
    assert len(bilevel_data(only, split=0.01).train_dataloader()) == 1


def test_split_of_several_loaders_keeps_their_settings() -> None:
    class Several(Numbers):
        def train_dataloader(self) -> Any:
            return {"a": numbers(8, 2, drop_last=True), "b": numbers(8, collate_fn=lambda rows: len(rows))}

    episode = next(iter(bilevel_data(Several(), split=0.5, inner_batches=2).train_dataloader()))
    assert {part["b"] for part in [*episode.inner, episode.outer]} == {1}
    taken = {value for batch in episode.inner for value in values(batch["a"])}
    assert len(taken) == 4
    assert not taken & set(values(episode.outer["a"]))


def unsplittable() -> list[Any]:
    data = TensorDataset(torch.arange(4.0))
    return [
        DataLoader(Unsized(4)),
        DataLoader(data, sampler=WeightedRandomSampler([1.0] * 4, 4)),
        DataLoader(data, sampler=torch.utils.data.RandomSampler(data, replacement=True)),
        DataLoader(data, sampler=torch.utils.data.RandomSampler(data, num_samples=2)),
        [torch.ones(2)],
    ]


def test_misuse() -> None:
    for loader in unsplittable():
        data = Numbers()
        data.train_dataloader = lambda loader=loader: loader
        with pytest.raises(ValueError, match=r"^Expected `train_dataloader\(\)` to be a `DataLoader` of a map-style"):
            bilevel_data(data, split=0.5).train_dataloader()
    with pytest.raises(ValueError, match=r"^Expected `bilevel_data\(split=\.\.\.\)` to be a fraction of two examples"):
        bilevel_data(Numbers(1), split=0.5).train_dataloader()
    with pytest.raises(ValueError, match=r"^Expected `bilevel_data\(datamodule\)` to be a `LightningDataModule`"):
        bilevel_data(numbers(3))
    with pytest.raises(ValueError, match=r"^Expected `bilevel_data\(inner_batches=\.\.\.\)` to be a positive integer"):
        bilevel_data(Numbers(), inner_batches=0)
    for wrong in (0, 1, 1.5):
        with pytest.raises(ValueError, match=r"^Expected `bilevel_data\(split=\.\.\.\)` to be a"):
            bilevel_data(Numbers(), split=wrong)
    with pytest.raises(MisconfigurationError, match=r"^Cannot use `bilevel_data\(split=\.\.\., val_loader=\.\.\.\)`"):
        bilevel_data(Numbers(), split=0.5, val_loader=0)
    with pytest.raises(MisconfigurationError, match=r"^Cannot use `bilevel_data` twice"):
        bilevel_data(bilevel_data(Numbers()))
    done = Numbers()
    done.train_dataloader = lambda: EpisodeLoader([1], [2])
    with pytest.raises(
        MisconfigurationError, match=r"^Cannot use `bilevel_data` with `Numbers`.*`EpisodeLoader` already"
    ):
        bilevel_data(done).train_dataloader()
    without = LightningDataModule.from_datasets(train_dataset=TensorDataset(torch.arange(4.0)))
    with pytest.raises(MisconfigurationError, match=r"^`LightningDataModule` has no `val_dataloader`\..*split=0\.2"):
        bilevel_data(without)
    assert len(bilevel_data(without, split=0.5).train_dataloader()) == 2  # its loader is an attribute of the instance


def test_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    def data() -> Any:
        return bilevel_data(Numbers(), inner_batches=2, split=0.5)

    torch.manual_seed(3)
    whole = fit(data(), max_epochs=3, callbacks=[SaveAt(tmp_path / "a.ckpt", 4, "on_train_batch_end")])
    rest = fit(data(), max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    assert rest.seen == whole.seen[4:]
    assert len(whole.seen) == 9


def test_a_loader_made_anew_shuffles_anew() -> None:
    torch.manual_seed(3)
    calls: list[int] = []

    class Counted(Numbers):
        def train_dataloader(self) -> Any:
            calls.append(self.trainer.current_epoch)
            return super().train_dataloader()

        def setup(self, stage: str) -> None:
            pass

    seen = fit(bilevel_data(Counted(), split=0.5), max_epochs=4, reload_dataloaders_every_n_epochs=1).seen
    assert calls == [0, 1, 2, 3]
    epochs = [[outer for _, outer in seen[start : start + 3]] for start in range(0, 12, 3)]
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) > 1
    assert len({frozenset(map(tuple, epoch)) for epoch in epochs}) == 1  # of the same split


def test_stands_for_the_data_module() -> None:
    data = Numbers()
    wrapped = bilevel_data(data, inner_batches=2)
    assert repr(wrapped).startswith("bilevel_data(")
    assert str(wrapped) == str(data)
    for other in (copy.copy(wrapped), copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        episode = next(iter(other.train_dataloader()))
        assert isinstance(episode, Episode)
        assert len(episode.inner) == 2
        assert isinstance(other, Numbers)
    assert copy.deepcopy(wrapped)._source is not data


def test_workers_that_stay() -> None:
    class Staying(Numbers):
        def train_dataloader(self) -> Any:
            return [numbers(4, num_workers=1, persistent_workers=True), numbers(4)]

        def setup(self, stage: str) -> None:
            pass

    torch.manual_seed(3)
    loader = bilevel_data(Staying(), inner_batches=4).train_dataloader()
    epochs = [[[values(part) for part in batch] for batch in episode.inner] for _ in range(2) for episode in loader]
    assert epochs[0] != epochs[1]
    loader.reset()
    assert loader.flattened[1].flattened[0]._iterator is None
