"""A fit freezes what no outer optimizer steps, and leaves the module as it was, also after an error."""

from __future__ import annotations

import copy
import signal
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor, nn

from lightning_bilevel import ForwardGradient, ReverseUnroll, hypergradient
from tests.support.modules import Calls, Cleaning, Maml, differing, flags, loader, parameters, trainer
from tests.support.seeds import seeded


def test_inner_parameters_are_given_back_where_a_move_makes_new_ones():
    """As on devices whose tensors cannot take the place of the CPU's."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        module = seeded(Cleaning)
        for _ in range(2):
            trainer(ReverseUnroll()).fit(module, loader())
            assert all(parameter.requires_grad for parameter in module.parameters())
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def test_a_copy_made_during_the_fit_computes_and_lives_on():
    copies = Calls(copy.deepcopy)
    module = seeded(Cleaning)
    trainer(ReverseUnroll(), copies).fit(module, loader())
    episode = next(iter(loader()))
    for clone in copies.seen:
        assert differing(parameters(clone), parameters(module)) or clone is copies.seen[-1]
        assert all(flags(clone).values())
        assert torch.isfinite(hypergradient(clone, ReverseUnroll(), episode).value)
    again = copies.seen[0]
    trainer(ReverseUnroll()).fit(again, loader())


@pytest.mark.parametrize(
    ("module", "trained"),
    [(Cleaning, {"example_weights", "log_lr"}), (Maml, {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"})],
)
def test_only_outer_parameters_require_gradients_during_a_fit(module, trained):
    module, seen = module(), []
    note = lambda trainer, module, *_: seen.append({name for name, flag in flags(module).items() if flag})  # noqa: E731
    spy = LambdaCallback(on_fit_start=note, on_train_batch_end=note)
    trainer(spy, ReverseUnroll()).fit(module, loader())
    assert seen == [trained] * 5
    assert all(flags(module).values())


class Failing(Cleaning):
    """Raises where it is told to, and has a layer that its user froze."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        self.where, self.error = where, error
        self.net[0].requires_grad_(False)

    def _fail(self, where: str) -> None:
        if where == self.where:
            raise self.error

    def setup(self, stage: str) -> None:
        self._fail("setup")

    def configure_optimizers(self) -> Any:
        self._fail("configure_optimizers")
        return super().configure_optimizers()

    def inner_loss(self, batch: Any) -> Tensor:
        if self.global_step == 2:
            self._fail("inner_loss")
        return super().inner_loss((batch[0], batch[1], batch[2]))

    def on_train_end(self) -> None:
        self._fail("on_train_end")


@pytest.mark.parametrize("where", ["setup", "configure_optimizers", "inner_loss", "on_train_end"])
@pytest.mark.parametrize(("error", "raised"), [(RuntimeError("boom"), RuntimeError), (KeyboardInterrupt(), SystemExit)])
def test_an_exception_leaves_the_module_as_it_was(where, error, raised, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Lightning would have later tests ignore Ctrl+C
    module = Failing(where, error)
    before, attributes = flags(module), set(module.__dict__)
    objects = {name: id(parameter) for name, parameter in module.named_parameters()}
    with pytest.raises(raised):
        trainer(ReverseUnroll()).fit(module, loader())
    assert flags(module) == before
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == objects
    assert set(module.__dict__) - {"_hparams"} == attributes  # no hook stays shadowed
    module.where = "nowhere"
    trainer(ReverseUnroll()).fit(module, loader())
    assert flags(module) == before


class BuildsLate(Cleaning):
    """Builds its layers in a hook."""

    def __init__(self, hook: str) -> None:
        super().__init__(net=nn.Identity)
        self.hook = hook

    def _build(self, hook: str) -> None:
        if self.hook == hook and isinstance(self.net, nn.Identity):
            self.net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))

    def setup(self, stage: str) -> None:
        self._build("setup")

    def configure_model(self) -> None:
        self._build("configure_model")


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_layers_may_be_built_in_a_hook(hook):
    late, early = BuildsLate(hook), seeded(Cleaning)
    for module in (late, early):
        trainer(ReverseUnroll()).fit(module, loader())
    assert differing(parameters(late), parameters(early)) == []
    assert all(flags(late).values())


class Skipping(Cleaning):
    """Leaves batches out, in one of its losses, as a training step of Lightning's does."""

    def __init__(self, level: str, skipped: tuple[int, ...]) -> None:
        super().__init__()
        self.level, self.skipped, self.outputs = level, skipped, []

    def _unless(self, level: str, loss: Any) -> Any:
        return None if level == self.level and self.trainer.fit_loop.batch_idx in self.skipped else loss

    def inner_loss(self, batch: Any) -> Any:
        return self._unless("inner", super().inner_loss(batch))

    def outer_loss(self, batch: Any) -> Any:
        return self._unless("outer", super().outer_loss(batch))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(set(outputs))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.outer_parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("level", ["inner", "outer"])
@pytest.mark.parametrize("strategy", [ReverseUnroll(), ForwardGradient(2, mode="forward")], ids=["reverse", "forward"])
def test_a_loss_of_none_skips_the_step(level, strategy):
    module, steps = seeded(lambda: Skipping(level, (0, 2))), Calls(parameters)
    before = parameters(module)
    trainer(strategy, steps).fit(module, loader())
    assert module.outputs == [set(), {"loss"}, set(), {"loss"}]
    assert not differing(steps.seen[0], before)
    assert not differing(steps.seen[2], steps.seen[1])
    assert {"example_weights", "net.0.weight"} <= set(differing(steps.seen[1], steps.seen[0]))
    assert {"example_weights", "net.0.weight"} <= set(differing(steps.seen[3], steps.seen[2]))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("skipped", [(1,), (0, 1)])
def test_of_accumulated_batches_those_with_a_loss_count(skipped):
    module, steps = seeded(lambda: Skipping("outer", skipped)), Calls(parameters)
    before = parameters(module)
    trainer(ReverseUnroll(), steps, accumulate_grad_batches=2).fit(module, loader())
    assert bool(differing(steps.seen[1], before)) == (skipped == (1,))
    assert differing(steps.seen[3], steps.seen[1])


def test_without_a_fit_a_loss_of_none_is_an_error():
    class Never(Cleaning):
        def outer_loss(self, batch: Any) -> Any:
            return None

    with pytest.raises(ValueError, match=r"^Expected `Never.outer_loss\(batch\)` to be a loss tensor, .* A fit skips"):
        hypergradient(Never(), ReverseUnroll(), next(iter(loader())))
