"""Modules that read their Trainer, outside of a fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from lightning_bilevel import (
    SGD,
    BilevelModule,
    Episode,
    EpisodeLoader,
    ReverseUnroll,
    StrategyAudit,
    audit,
    bilevel,
    hypergradient,
)
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.training.attachment import attached
from tests.support.modules import FEATURES, Maml, trainer
from tests.support.seeds import seeded
from tests.support.wrapping import Minimal

PAIR = torch.ones(4, FEATURES), torch.ones(4, 1)
EPISODE = Episode([PAIR], PAIR)
FILE = Path(__file__).name

READS: dict[str, Callable[[LightningModule], Any]] = {
    "trainer": lambda module: module.trainer.global_step,
    "datamodule": lambda module: module.trainer.datamodule,
    "optimizers": lambda module: module.optimizers(),
    "lr_schedulers": lambda module: module.lr_schedulers(),
    "all_gather": lambda module: module.all_gather(torch.ones(1)),
    "print": lambda module: module.print(end=""),
}


class Own(Maml):
    read: Callable[[LightningModule], Any]

    def inner_loss(self, batch: Any) -> Tensor:
        type(self).read(self)
        return super().inner_loss(batch)


class Existing(Minimal):
    read: Callable[[LightningModule], Any]

    def training_step(self, batch: Any) -> Tensor:
        type(self).read(self)
        return super().training_step(batch)


class Configured(Maml):
    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1 / (1 + self.trainer.current_epoch))


def reading(read: Callable[[LightningModule], Any], kind: type) -> BilevelModule:
    made = seeded(type(kind.__name__, (kind,), {"read": read}))
    if kind is Own:
        return made
    return bilevel(made, inner="head", outer="body", inner_optimizer=SGD(lr=0.1), inner_start="reset")


def place(read: Callable[[LightningModule], Any]) -> str:
    return f"{FILE}:{inspect.getsourcelines(read)[1]}"


@pytest.mark.parametrize("kind", [Own, Existing])
@pytest.mark.parametrize("what", READS)
def test_the_users_line_is_named_and_a_trainer_is_lent(what: str, kind: type) -> None:
    module, line = reading(READS[what], kind), place(READS[what])
    row = audit(module, EPISODE, [ReverseUnroll()], verbose=False).rows[0]
    assert row.verdict == "no"
    assert row.because == f"`self.trainer` is read, and the module is in no fit ({line})"
    assert "StrategyAudit()" in row.advice
    message = (
        rf"^Cannot use `hypergradient` with `\w*` outside of a fit.*reads `self\.trainer` \({line}\)\. Pass `hyperg"
    )
    with pytest.raises(MisconfigurationError, match=message):
        hypergradient(module, ReverseUnroll(), EPISODE)
    with (
        pytest.raises(MisconfigurationError, match=rf"^Cannot use `adapted` with .*\({line}\)\. Call it in a hook"),
        module.adapted([PAIR]),
    ):
        pass
    lent = trainer()
    assert audit(module, EPISODE, [ReverseUnroll()], verbose=False, trainer=lent).rows[0].works
    found = hypergradient(module, ReverseUnroll(), EPISODE, trainer=lent).grads
    without = reading(lambda module: None, kind)
    torch.testing.assert_close(found, hypergradient(without, ReverseUnroll(), EPISODE).grads, rtol=0, atol=0)
    assert all(child._trainer is None for child in module.modules() if isinstance(child, LightningModule))


@pytest.mark.parametrize(
    "read", [lambda m: m.global_step + m.current_epoch + m.local_rank, lambda m: (m.logger, m.fabric)]
)
def test_what_needs_no_trainer(read: Callable[[LightningModule], Any]) -> None:
    module = reading(read, Existing)
    assert audit(module, EPISODE, [ReverseUnroll()], verbose=False).rows[0].works
    hypergradient(module, ReverseUnroll(), EPISODE)


def test_in_a_fit_an_audit_works() -> None:
    module = reading(READS["trainer"], Existing)
    trainer(ReverseUnroll(), StrategyAudit([ReverseUnroll()])).fit(module, EpisodeLoader([PAIR], [PAIR]))
    assert module.module._trainer is None  # as after any fit of a wrapped module


def test_a_hook_that_is_no_loss() -> None:
    module = seeded(Configured)
    for call in (
        lambda: hypergradient(module, ReverseUnroll(), EPISODE),
        lambda: audit(module, EPISODE, verbose=False),
    ):
        with pytest.raises(MisconfigurationError, match=rf"outside of a fit.*`self\.trainer` \({FILE}:\d+\)"):
            call()
    with pytest.raises(MisconfigurationError, match=r"^Cannot use `adapted`"), module.adapted([PAIR]):
        pass
    hypergradient(module, ReverseUnroll(), EPISODE, trainer=trainer())


def test_what_is_read_in_the_block_is_the_callers_business() -> None:
    module = seeded(Maml)
    with pytest.raises(RuntimeError, match=r"^Maml is not attached to a `Trainer`"), module.adapted([PAIR]):
        module.trainer.global_step  # noqa: B018


def test_every_module_has_what_it_had() -> None:
    class Outer(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.plain = LightningModule(), nn.Linear(1, 1)

    module, first, second = Outer(), trainer(), trainer()
    module.inside.trainer = first
    with attached(module, "audit", second):
        assert module.trainer is module.inside.trainer is second
    assert module._trainer is None
    assert module.inside.trainer is first
    with pytest.raises(ValueError, match=r"^Expected `audit\(trainer=\.\.\.\)` to be a `Trainer`, got 3"):
        audit(seeded(Maml), EPISODE, trainer=3)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="^another$"), attached(module, "audit"):
        raise RuntimeError("another")
