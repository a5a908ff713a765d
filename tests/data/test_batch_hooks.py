"""Batch hooks see single batches, whoever has them."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from lightning_bilevel import SGD, Episode, EpisodeLoader, ReverseUnroll, bilevel
from lightning_bilevel.data.batch_hooks import each_batch, holds_episodes, settled
from lightning_bilevel.data.inputs import Batches
from tests.support.modules import FEATURES, Maml, listed, trainer
from tests.support.seeds import seeded
from tests.support.wrapping import Minimal

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
PAIR = torch.ones(4, FEATURES), torch.ones(4, 1)
EPISODE = Episode([PAIR, PAIR], PAIR)


class Hooks:
    """All three hooks, which take a pair apart."""

    def note(self, hook: str, batch: Any) -> Any:
        x, y = batch
        assert isinstance(x, Tensor)
        assert isinstance(y, Tensor)
        vars(self).setdefault("seen", []).append(hook)
        return x / 2, y

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.note("on_before_batch_transfer", batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        assert isinstance(device, torch.device)
        return self.note("transfer_batch_to_device", batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.note("on_after_batch_transfer", batch)


class Data(LightningDataModule):
    def __init__(self, train: Any) -> None:
        super().__init__()
        self.train = train

    def train_dataloader(self) -> Any:
        return self.train


class Mixed(Hooks, Data):
    pass


class Derived(Mixed):
    pass


class Watched(Maml):
    """Keeps what reaches its steps."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch


class Judged(Watched):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.batch = batch


class HookedMaml(Hooks, Watched):
    pass


class HookedMinimal(Hooks, Minimal):
    pass


FORMS = {
    "episodes": (lambda: EpisodeLoader([PAIR, PAIR], [PAIR], inner_batches=2), 3),
    "lists": (lambda: listed([[EPISODE, EPISODE]]), 6),
    "mappings": (lambda: listed([{"inner": PAIR, "outer": PAIR}]), 2),
}


def wrapped(kind: type) -> Any:
    return bilevel(kind(), inner="head", outer="body", inner_optimizer=SGD(lr=0.1), inner_start="reset")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("owner", ["mixin", "base class", "module", "wrapped module", "beside a wrapped module"])
def test_hooks_get_every_batch_once(owner: str, form: str) -> None:
    loader, batches = FORMS[form]
    data: Any = {"mixin": Mixed, "base class": Derived, "beside a wrapped module": Derived}.get(owner, Data)(loader())
    if owner == "module":
        module = hooked = seeded(HookedMaml)
    elif "wrapped" in owner:
        module = wrapped(HookedMinimal if owner == "wrapped module" else Minimal)
        hooked = module.module if owner == "wrapped module" else data
    else:
        module, hooked = seeded(Watched), data
    if owner in ("module", "wrapped module"):  # given a data module, Lightning warns that it takes the module's hooks
        trainer(ReverseUnroll(), max_epochs=1).fit(module, data.train)
    else:
        trainer(ReverseUnroll(), max_epochs=1).fit(module, datamodule=data)
    assert hooked.seen == [hook for hook in HOOKS for _ in range(batches)]
    if isinstance(module, Watched):
        changed = [part for part in tree_leaves(module.batch) if part.shape == PAIR[0].shape]
        assert len(changed) == batches
        assert all(torch.equal(part, PAIR[0] / 8) for part in changed)


def test_hooks_of_a_data_module_replace_those_of_the_module() -> None:
    module, data = seeded(HookedMaml), Mixed(listed([EPISODE]))
    with pytest.warns(UserWarning, match=r"^You have overridden `\w+` in both `LightningModule` and"):
        trainer(ReverseUnroll(), max_epochs=1).fit(module, datamodule=data)
    assert len(data.seen) == 9
    assert not hasattr(module, "seen")


def test_episodes_in_validation_and_single_batches() -> None:
    module, fit, data = seeded(Judged), trainer(ReverseUnroll()), Derived(None)
    for given, calls, kind in ((EPISODE, 9, Episode), (PAIR, 3, tuple)):
        data.val_dataloader = lambda given=given: listed([given])
        data.seen = []
        fit.validate(module, datamodule=data, verbose=False)
        assert len(data.seen) == calls
        assert type(module.batch) is kind


def test_without_hooks_an_episode_moves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = LightningModule.transfer_batch_to_device

    def spy(self: Any, batch: Any, *args: Any) -> Any:
        calls.append(batch)
        return original(self, batch, *args)

    # As Lightning's own, so that it is no override.
    monkeypatch.setattr(LightningModule, "transfer_batch_to_device", spy)
    trainer(ReverseUnroll(), max_epochs=1).fit(seeded(Maml), datamodule=Data(listed([EPISODE])))
    assert len(calls) == 1


def test_what_holds_episodes() -> None:
    for other in ([], [1], (PAIR, PAIR), {"inner": 1}, {"inner": 1, "outer": 2, "more": 3}, None, torch.ones(2)):
        assert not holds_episodes(other)
    doubled = each_batch({"inner": 1, "outer": 2}, lambda batch: 2 * batch)
    assert doubled == {"inner": 2, "outer": 4}
    assert each_batch((EPISODE,), lambda batch: 0) == [Episode([0, 0], 0)]


def test_what_is_in_its_place_is_handed_out_as_the_transfer_does() -> None:
    here, there = torch.device("cpu"), torch.device("meta")
    batch = [Episode(Batches([PAIR, {"x": [PAIR[0], None, "a"]}]), (PAIR[1], 2))]
    found, moved = settled(batch, here), move_data_to_device(batch, here)
    assert tree_flatten(found)[1] == tree_flatten(moved)[1]
    assert all(a is b for a, b in zip(tree_leaves(found), tree_leaves(moved), strict=True))
    assert found[0].inner[1] is not batch[0].inner[1]  # a loss may write to what is the loader's
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2)])
    parts: list[Any] = [packed, UserDict(x=PAIR[0]), torch.nn.Parameter(PAIR[0]), torch.device("cpu"), object()]
    assert [settled([Episode([part], PAIR)], here) for part in parts] == [None] * len(parts)
    assert settled(batch, there) is None
