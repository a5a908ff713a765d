"""Ctrl-C and errors leave the checkpoint that the user asked for; a loader whose worker dies says so."""

from __future__ import annotations

import inspect
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_bilevel import EpisodeLoader, ForwardGradient, ReverseUnroll
from tests.support.fits import fit
from tests.support.modules import Cleaning, identical, loader, trainer
from tests.support.seeds import seeded

STEPS, INTERRUPTED = 7, 2  # four steps are an epoch
CAN_SAVE = "save_on_exception" in inspect.signature(ModelCheckpoint).parameters
SAVERS = [
    pytest.param(
        lambda folder: ModelCheckpoint(folder, save_on_exception=True),
        marks=pytest.mark.skipif(not CAN_SAVE, reason="needs a newer Lightning"),
        id="ModelCheckpoint",
    ),
    pytest.param(OnExceptionCheckpoint, id="OnExceptionCheckpoint"),
]


class CtrlC(Cleaning):
    """Its user presses Ctrl-C, or a bug shows, in the middle of a step."""

    error: BaseException | None = None

    def inner_loss(self, batch: Any) -> Tensor:
        if self.error is not None and self.global_step == INTERRUPTED:
            if isinstance(self.error, KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            raise self.error
        return super().inner_loss(batch)


def ended(*saver: Callback, error: BaseException | None = None, ckpt_path: Path | None = None) -> Any:
    module = seeded(CtrlC, 1 if ckpt_path else 0)
    module.error = error
    options = {"max_epochs": -1, "max_steps": STEPS, "enable_checkpointing": bool(saver), "ckpt_path": ckpt_path}
    try:
        running = fit(ForwardGradient(2), *saver, module=module, batches=loader(shuffle=True), **options)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning has it ignored after a Ctrl-C
    return [module.state_dict(), running.optimizers[0].state_dict(), module.fit_context.state_dict()]


@pytest.mark.parametrize(("error", "raised"), [(KeyboardInterrupt(), SystemExit), (RuntimeError("bug"), RuntimeError)])
@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:.*(was called without a model|no last checkpoint)")
def test_an_interrupted_fit_leaves_a_checkpoint_and_goes_on_exactly(error, raised, saver, tmp_path):
    with pytest.raises(raised):
        ended(saver(tmp_path), error=error)
    (path,) = tmp_path.glob("*.ckpt")
    assert torch.load(path, weights_only=False)["global_step"] == INTERRUPTED
    assert identical(ended(ckpt_path=path), ended())


class Dying(Dataset[Tensor]):
    """Its worker process is killed, as for lack of memory."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        os._exit(1)


def test_a_worker_that_dies_is_reported_by_torch(tmp_path):
    dying = DataLoader(Dying(), batch_size=2, num_workers=1)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.* exited unexpectedly"):
        trainer(ReverseUnroll()).fit(Cleaning(), EpisodeLoader(dying, dying, 1))


class Failing(Dying):
    def __getitem__(self, index: int) -> Tensor:
        raise KeyError("no such file")


def test_an_error_in_a_worker_keeps_its_traceback():
    failing = DataLoader(Failing(), batch_size=2, num_workers=1)
    with pytest.raises(KeyError, match=r"(?s)Caught KeyError in DataLoader worker.*in __getitem__.*no such file"):
        trainer(ReverseUnroll()).fit(Cleaning(), EpisodeLoader(failing, failing, 1))
