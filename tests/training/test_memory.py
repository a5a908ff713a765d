"""What lasts from step to step, from fit to fit and through a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_bilevel import Adam, BilevelModule, ForwardGradient, ReverseUnroll, TruncatedReverse
from lightning_bilevel.testing import Quadratic
from tests.support.modules import Calls, Cleaning, differing, identical, loader, parameters, trainer
from tests.support.seeds import seeded


def test_fitting_twice_goes_on():
    module, fit = seeded(Cleaning), trainer(ReverseUnroll(), max_epochs=1)
    fit.fit(module, loader())
    between = parameters(module)
    fit.fit_loop.max_epochs = 2
    fit.fit(module, loader())
    assert len(module.values) == 8
    assert differing(between, parameters(module))
    again = seeded(Cleaning)
    for _ in range(2):
        trainer(ReverseUnroll()).fit(again, loader())
    assert len(again.values) == 8
    assert module.fit_context.memory.estimates == again.fit_context.memory.estimates == 4


RESUMED: dict[str, tuple[Callable[[], BilevelModule], Callable[[], Any]]] = {
    "warm, momentum": (Cleaning, ReverseUnroll),
    "warm, Adam": (lambda: Cleaning(optimizer=lambda lr: Adam(lr=0.1 * lr)), ReverseUnroll),
    "random directions": (Cleaning, lambda: ForwardGradient(num_directions=2)),
    "reset": (lambda: Cleaning(inner_start="reset"), lambda: ForwardGradient(num_directions=2)),
    "reinit": (lambda: Cleaning(inner_start="reinit"), lambda: TruncatedReverse(steps=2)),
}
STEPS = {"max_epochs": -1}
SAFELY = {"weights_only": True} if "weights_only" in signature(Trainer.fit).parameters else {}  # Lightning >= 2.6
STOPS = [  # first limits, whole limits, when to save, steps taken by then
    pytest.param({"max_steps": 3, **STEPS}, {"max_steps": 7, **STEPS}, {"every_n_train_steps": 3}, 3, id="mid-epoch"),
    pytest.param({"max_steps": 4, **STEPS}, {"max_steps": 7, **STEPS}, {"every_n_train_steps": 4}, 4, id="epoch"),
    pytest.param({"max_epochs": 1}, {"max_epochs": 2}, {"every_n_epochs": 1}, 4, id="by epochs"),
]


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize(("first", "limits", "when", "done"), STOPS)
def test_resuming_equals_going_on_bit_for_bit(name, first, limits, when, done, tmp_path):
    build, strategy = RESUMED[name]

    def run(seed, limits, **options):
        with torch.random.fork_rng():
            seed_everything(seed, verbose=False)
            module, save = build(), ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **when)
            fit = trainer(strategy(), save, enable_checkpointing=True, **limits)
            fit.fit(module, loader(shuffle=True), **options)
        return module, fit

    run(1, first)
    whole, whole_fit = run(1, limits)
    resumed, resumed_fit = run(2, limits, ckpt_path=tmp_path / f"step={done}.ckpt", **SAFELY)
    assert torch.equal(torch.stack(whole.values[done:]), torch.stack(resumed.values))
    assert differing(parameters(whole), parameters(resumed)) == []
    assert identical(whole.fit_context.state_dict(), resumed.fit_context.state_dict())
    assert identical(whole_fit.optimizers[0].state_dict(), resumed_fit.optimizers[0].state_dict())


def test_a_checkpoint_from_elsewhere_is_where_reset_returns_to(tmp_path):
    first = trainer(ReverseUnroll(), max_steps=1)
    first.fit(Cleaning(inner_start="reset"), loader())
    first.save_checkpoint(tmp_path / "own.ckpt")
    checkpoint = torch.load(tmp_path / "own.ckpt", weights_only=True)
    del checkpoint["lightning_bilevel"]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    second = Cleaning(inner_start="reset")
    with pytest.warns(UserWarning, match="This checkpoint has no inner state"):
        trainer(ReverseUnroll(), max_steps=2).fit(second, loader(), ckpt_path=tmp_path / "other.ckpt", **SAFELY)
    initial = second.fit_context.state_dict()["initial"]
    assert initial
    assert all(torch.equal(value, checkpoint["state_dict"][name]) for name, value in initial.items())


def test_inner_steps_may_change_during_a_fit():
    class Module(Cleaning):
        def on_train_epoch_start(self):
            self.inner_steps = 1 + self.current_epoch

    calls = Calls(lambda module: module.fit_context.memory.steps)
    trainer(ReverseUnroll(), calls, max_epochs=2).fit(Module(), loader())
    assert calls.seen == [1, 2, 3, 4, 6, 8, 10, 12]


class Planned(Quadratic):
    """Whose inner level starts as is written down for each batch; φ stays."""

    def __init__(self, *plan: str) -> None:
        super().__init__("momentum", inner_start=plan[0])
        self.plan = plan

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.inner_start = self.plan[batch_idx]

    def configure_optimizers(self):
        return torch.optim.SGD(self.outer_parameters(), lr=0.0)


def test_a_run_that_starts_anew_has_no_momentum_of_long_ago() -> None:
    modules = [Planned("reset"), Planned("reset", "warm", "reset"), Planned("reset", "warm", "warm", "reset", "warm")]
    for module in modules:
        data = [module.episode()] * len(module.plan)
        trainer(ReverseUnroll()).fit(module, DataLoader(data, batch_size=None))
    alone, after, on = modules
    assert torch.equal(alone.theta, after.theta)
    assert after.fit_context.memory.opt_state == {}
    assert on.fit_context.memory.steps == on.inner_steps
