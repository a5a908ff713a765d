"""What ``bilevel`` refuses, by name."""

from __future__ import annotations

from typing import Any

import pytest
from pytorch_lightning import LightningModule
from torch import nn

from lightning_bilevel import SGD, ReverseUnroll, bilevel, hypergradient
from lightning_bilevel.errors import MisconfigurationError
from tests.support.modules import loader, tasks, trainer
from tests.support.wrapping import ByHand, Manual, Minimal, validation, wrapped


class Big(Minimal):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)) for _ in range(30))


class NoStep(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)


def frozen() -> Any:
    module = Minimal()
    module.head.requires_grad_(False)
    return module


REFUSALS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no match": (
        Minimal,
        {"inner": "nte.*"},
        ValueError,
        r"Expected `bilevel\(inner=...\)` to be names, patterns, submodules or parameters of `Minimal`, got 'nte.\*'. "
        r"`Minimal` has body.weight, body.bias, head.weight, head.bias.$",
    ),
    "no match, big": (
        Big,
        {"outer": ["head", ""]},
        ValueError,
        r"Expected `bilevel\(outer=...\)` to .* got ''. `Big` has body.\* \(2\), head.\* \(2\), blocks.\* \(120\).$",
    ),
    "from elsewhere": (
        Minimal,
        {"outer": nn.Linear(1, 1)},
        ValueError,
        r"Expected `bilevel\(outer=...\)` to be .*, got a `Linear` from elsewhere. `Minimal` has body.weight",
    ),
    "a number": (Minimal, {"inner": 3}, ValueError, r"Expected `bilevel\(inner=...\)` to be names, .*, got 3. "),
    "nothing": (
        Minimal,
        {"inner": []},
        ValueError,
        r"Expected `bilevel\(inner=...\)` to be parameters of `Minimal` that require gradients, got 'none'.$",
    ),
    "frozen": (
        frozen,
        {},
        ValueError,
        r"Expected `bilevel\(inner=...\)` to be parameters of `Minimal` that require gradients, "
        "got 'frozen ones: head.weight, head.bias'. Call",
    ),
    "no module": (
        lambda: nn.Linear(1, 1),
        {},
        ValueError,
        r"Expected `bilevel\(module\)` to be a `pytorch_lightning.LightningModule`, got 'torch.Linear'.$",
    ),
    "bilevel already": (ByHand, {}, MisconfigurationError, "Cannot use `bilevel` with `ByHand`. This is because it is"),
    "manual": (
        Manual,
        {},
        MisconfigurationError,
        "Cannot use `bilevel` with `Manual`, which optimizes manually. This is because its `training_step` .*Pass both",
    ),
    "manual, by name": (
        Manual,
        {"inner_loss": "loss", "outer_loss": "training_step"},
        MisconfigurationError,
        "Cannot use `bilevel` with `Manual`, which optimizes manually. This is because its `training_step` .*Pass both",
    ),
    "no training step": (
        NoStep,
        {"inner": "net", "outer": "net"},
        MisconfigurationError,
        r"`NoStep` has no `training_step`. Pass `bilevel\(inner_loss=...\)`.$",
    ),
    "unknown loss": (
        Minimal,
        {"outer_loss": "lost"},
        ValueError,
        r"Expected `bilevel\(outer_loss=...\)` to be a function of the module and a batch, or the name of a method of "
        "`Minimal`, got 'lost'.$",
    ),
    "no loss": (Minimal, {"inner_loss": 3}, ValueError, r"Expected `bilevel\(inner_loss=...\)` to be .*, got 3.$"),
    "no optimizer": (
        Minimal,
        {"inner_optimizer": 0.1},
        ValueError,
        r"Expected `bilevel\(inner_optimizer=...\)` to be an `InnerOptimizer`, a function of the module .*, got 0.1. W",
    ),
    "an optimizer's class": (
        Minimal,
        {"inner_optimizer": SGD},
        ValueError,
        r"Expected `bilevel\(inner_optimizer=...\)` to be an `InnerOptimizer`, .*, got <class",
    ),
    "steps": (Minimal, {"inner_steps": 0}, ValueError, r"Expected `BilevelModule\(inner_steps=...\)` to be a positive"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    build, options, error, message = REFUSALS[name]
    defaults = {"inner": "head", "outer": "body", "inner_optimizer": SGD(lr=0.1)}
    with pytest.raises(error, match=f"^{message}"):
        bilevel(build(), **{**defaults, **options})


@pytest.mark.parametrize("result", [None, {"lost": 1}])
def test_a_training_step_without_a_loss_is_refused(result):
    class Silent(Minimal):
        def training_step(self, batch, batch_idx):
            return result

    wrapper = bilevel(Silent(), inner="head", outer="body", inner_optimizer=SGD(lr=0.1))
    with pytest.raises(
        ValueError, match=r"^Expected `Silent.training_step\(batch\)` to be a loss tensor, or a mapping"
    ):
        hypergradient(wrapper, ReverseUnroll(), tasks(1)[0])


def test_a_fit_without_a_strategy_is_refused():
    with pytest.raises(MisconfigurationError, match="^`BilevelPlain` has no hypergradient strategy. Add one to the"):
        trainer().fit(wrapped(), loader(), validation())
