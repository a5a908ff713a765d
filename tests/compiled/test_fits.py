"""Fits by compiled steps: in a Trainer, saved and resumed, in other precisions, of a module as it is."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, ForwardGradient, ReverseUnroll, bilevel, hypergradient
from tests.support.compiled import CLASSES, FEATURES, Weighted, episode, weighted
from tests.support.fits import EPISODES, Fit, SaveAt, fit
from tests.support.modules import listed, trainer

EPISODES_OF_CLASSES = [episode(seed) for seed in range(4)]


def fitted(compiles: bool, **options: Any) -> Weighted:
    module = weighted(
        inner_start="warm",
        optimizer=lambda module: SGD(lr=module.log_lr.exp(), momentum=0.9),
        compile=compiles,
    )
    trainer(ReverseUnroll(), max_epochs=2, **options).fit(module, listed(EPISODES_OF_CLASSES))
    return module


def states(module: nn.Module) -> Tensor:
    return torch.cat([value.detach().reshape(-1).double() for value in module.state_dict().values()])


def test_a_fit_ends_where_the_eager_one_does(calls: list[int]) -> None:
    ours = fitted(compiles=True)
    assert len(calls) >= 8
    eager = fitted(compiles=False)
    torch.testing.assert_close(states(ours), states(eager), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-10), ("bf16-mixed", 0.02)])
def test_precisions(precision: Any, tolerance: float, calls: list[int]) -> None:
    ours = fitted(compiles=True, precision=precision)
    assert calls
    eager = fitted(compiles=False, precision=precision)
    assert (states(ours) - states(eager)).norm() <= tolerance * states(eager).norm()


class Seen(Fit):
    """Counts its batches."""

    def __init__(self, **options: Any) -> None:
        super().__init__(dropout=0.3, compile=True, **options)
        self.seen: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(len(self.seen))


@pytest.mark.parametrize("strategy", [ReverseUnroll, lambda: ForwardGradient(2)], ids=["reverse", "forward"])
def test_a_resumed_fit_is_exactly_the_one_that_was_not_cut_off(strategy: Any, tmp_path: Path, calls: list[int]) -> None:
    path = tmp_path / "half.ckpt"
    whole = fit(strategy(), SaveAt(path, len(EPISODES), "on_train_epoch_end"), module=Seen(), max_epochs=2)
    assert calls
    resumed = fit(strategy(), module=Seen(), ckpt_path=path, max_epochs=2)
    assert torch.equal(states(whole.lightning_module), states(resumed.lightning_module))


class Plain(LightningModule):
    """A module that knows of no levels, and logs as modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.logits = nn.Linear(FEATURES, CLASSES), nn.Parameter(torch.zeros(6))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        loss = (self.logits[index].sigmoid() * losses).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_a_module_as_it_is_that_logs(calls: list[int]) -> None:
    logged, ends = [], []
    for compiles in (True, False):
        torch.manual_seed(0)
        module = bilevel(
            Plain(),
            inner="net",
            outer="logits",
            outer_loss="validation",
            inner_optimizer=torch.optim.Adam,
            outer_optimizer=torch.optim.Adam,
            inner_steps=2,
            compile=compiles,
        )
        run = trainer(ReverseUnroll())
        run.fit(module, listed(EPISODES_OF_CLASSES))
        logged.append(run.callback_metrics["train/loss"])
        ends.append(states(module))
        assert calls
    torch.testing.assert_close(*logged)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_copies_and_pickles_leave_graphs_behind(calls: list[int]) -> None:
    module = weighted(term=identity, optimizer=descent)
    before = hypergradient(module, ReverseUnroll(), episode()).grads["logits"]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        calls.clear()
        assert torch.equal(hypergradient(twin, ReverseUnroll(), episode()).grads["logits"], before)
        assert calls


def identity(module: Any, loss: Tensor) -> Tensor:
    return loss


def descent(module: Any) -> SGD:
    return SGD(lr=0.3)


def test_adapting_takes_compiled_steps(calls: list[int]) -> None:
    module = weighted()
    with module.adapted(list(episode().inner)):
        ours = states(module.net)
    assert calls
    module.compiles_steps = False
    with module.adapted(list(episode().inner)):
        torch.testing.assert_close(states(module.net), ours)


def test_what_compile_may_be() -> None:
    with pytest.raises(ValueError, match=r"Expected `BilevelModule\(compile=\.\.\.\)` to be True or False, got 'yes'"):
        BilevelModule(compile="yes")  # type: ignore[arg-type]
