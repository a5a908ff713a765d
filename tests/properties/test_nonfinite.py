"""A nan or an infinity, wherever it comes up: it stops the fit with names, or its outer step is skipped."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback
from torch import Tensor, nn

from lightning_bilevel import FSLA, SGD, Adam, BilevelModule, Episode, ForwardGradient, ReverseUnroll, ZerothOrder
from tests.support.fits import fit
from tests.support.modules import identical, listed, tasks, trainer
from tests.support.seeds import seeded
from tests.support.tables import every_strategy

GOOD = seeded(lambda: [(torch.randn(4, 2), torch.randn(4, 1)) for _ in range(6)])
BAD = (torch.full((4, 2), math.nan), GOOD[0][1])


class Net(BilevelModule):
    """A net under Adam with BatchNorm and dropout, weights on its two inputs outside: state of every kind."""

    def __init__(self, optimizer: Any = lambda: Adam(lr=0.05), **options: Any) -> None:
        super().__init__(**{"inner_steps": 2, **options})
        self.net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.2), nn.Linear(3, 1))
        self.scale = nn.Parameter(torch.ones(2))
        self.optimizer = optimizer

    def inner_parameters(self) -> Any:
        return self.net

    def inner_loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(self.scale * batch[0]), batch[1], reduction="sum")

    outer_loss = inner_loss

    def configure_inner_optimizer(self) -> Any:
        return self.optimizer()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.outer_parameters(), lr=0.1, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]


class Steps(Callback):
    """Keeps all state after each batch."""

    def __init__(self) -> None:
        self.seen, self.logged = [], []

    def on_train_batch_end(self, running: Any, module: Any, *_: Any) -> None:
        kept = {name: value for name, value in module.fit_context.state_dict().items() if name not in COUNTED}
        state = [module.state_dict(), kept, running.optimizers[0].state_dict()["state"]]
        self.seen.append(copy.deepcopy(state))
        self.logged.append({name: value.item() for name, value in running.callback_metrics.items()})


COUNTED = ("estimates", "skipped")


def episodes(*bad: tuple[int, str]) -> list[Episode]:
    """Return five episodes; ``(number, level)`` has a nan there."""
    made = [Episode(GOOD[i : i + 1], GOOD[i + 1]) for i in range(5)]
    for number, level in bad:
        made[number] = made[number]._replace(**{level: [BAD] if level == "inner" else BAD})
    return made


def watched(strategy: Any, module: Any, batches: list[Any], **options: Any) -> Steps:
    watch = Steps()
    fit(strategy, watch, module=module, batches=batches, **options)
    return watch


# ---------------------------------------------------------------------------------------------------------------------
# Raise
# ---------------------------------------------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("level", ["inner", "outer"])
@pytest.mark.filterwarnings("ignore:.*(diverges|is small|goes on without it)")
def test_every_strategy_names_itself(row, level):
    module = seeded(lambda: Net(lambda: SGD(lr=0.1), **row.needs))
    strategy = row.build(module)
    with pytest.raises(FloatingPointError, match=rf"^Expected the {level} loss .*\(Hypergradient strategy: `\w+`\.\)$"):
        watched(strategy, module, episodes((2, level)))
    assert all(bool(torch.isfinite(value).all()) for value in module.state_dict().values())


class Rooted(BilevelModule):
    """Infinite derivatives at zero: of the last inner step only, or of the learned initialization."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"inner_steps": 1, "inner_start": "reset", **options})
        self.theta, self.phi = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))

    def inner_parameters(self) -> Any:
        return [self.theta]

    def inner_loss(self, batch: Any) -> Tensor:
        return (self.phi * (self.theta**2).sqrt()).sum()  # the derivative of the root is inf * 0

    def outer_loss(self, batch: Any) -> Tensor:
        return 0 * self.phi.sum()

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.outer_parameters(), lr=1.0)


def test_a_parameter_that_the_last_step_spoils_is_named():
    message = r"^Expected the inner parameter `theta` after the last inner step to be finite, got nan or inf\. Lower"
    with pytest.raises(FloatingPointError, match=message):
        watched(ReverseUnroll(), Rooted(), tasks(1))


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_an_outer_parameter_that_became_infinite_is_named_and_not_skipped(on_nonfinite):
    class Exploding(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.outer_parameters(), lr=math.inf)

    message = (
        r"^Expected the outer parameter `scale` to be finite, got nan or inf after the last outer step\. Lower the "
    )
    with pytest.raises(FloatingPointError, match=message):
        watched(ReverseUnroll(), Exploding(on_nonfinite=on_nonfinite), episodes())


# ---------------------------------------------------------------------------------------------------------------------
# Skip
# ---------------------------------------------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("level", ["inner", "outer"])
@pytest.mark.filterwarnings("ignore:.*(diverges|is small|goes on without it)")
def test_a_skipped_step_changes_nothing(row, level):
    module = seeded(lambda: Net(lambda: SGD(lr=0.1), on_nonfinite="skip", **row.needs))
    strategy = row.build(module)
    with pytest.warns(UserWarning, match=rf"Skipped an outer step, .*`skipped_steps`.*: Expected the {level} loss"):
        watch = watched(strategy, module, episodes((2, level), (3, level)))
    before, first, second, after = watch.seen[1:]
    assert identical(before, first)
    assert identical(before, second)
    assert not identical(before, after)
    assert [logged["skipped_steps"] for logged in watch.logged] == [0, 0, 1, 2, 2]
    assert math.isfinite(watch.logged[2]["outer_loss"])  # that of the step before
    assert all(bool(torch.isfinite(value).all()) for value in module.state_dict().values())


@pytest.mark.parametrize("strategy", [ReverseUnroll, FSLA, lambda: ForwardGradient(2), lambda: ZerothOrder(2)])
@pytest.mark.filterwarnings("ignore:Skipped", "ignore:.*is small")
def test_skipping_goes_on_as_if_the_batch_had_not_been_there(strategy):
    """The random draws go by the number of the estimate, so that one is counted for the missing batch too."""

    class Counting(Net):
        counted = False

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2 and self.counted:
                self.fit_context.memory.estimates += 1

    def last(batches: list[Episode], counted: bool) -> Any:
        module = seeded(lambda: Counting(lambda: SGD(lr=0.1), inner_steps=1, on_nonfinite="skip"))
        module.counted = counted
        return watched(strategy(), module, batches).seen[-1]

    assert identical(last(episodes((2, "outer")), False), last(episodes()[:2] + episodes()[3:], True))


@pytest.mark.filterwarnings("ignore:Skipped")
def test_with_accumulation_the_rest_counts():
    """A step of two batches, one of them skipped, is a step on half the other's hypergradient."""
    module = seeded(lambda: Net(on_nonfinite="skip"))
    watch = watched(
        ReverseUnroll(), module, episodes((1, "outer"), (2, "inner"), (3, "inner")), accumulate_grad_batches=2
    )
    assert not identical(watch.seen[0][0]["scale"], watch.seen[1][0]["scale"])
    assert identical(watch.seen[1], watch.seen[3])
    assert not identical(watch.seen[3][0]["scale"], watch.seen[4][0]["scale"])


@pytest.mark.filterwarnings("ignore:Skipped")
def test_one_episode_of_several_skips_the_step():
    module = seeded(lambda: Rooted(on_nonfinite="skip"))
    watch = watched(ReverseUnroll(), module, [tasks(3)] * 2)
    assert identical(*watch.seen)
    assert watch.logged[-1]["skipped_steps"] == 2


def test_the_warning_comes_once_and_barebones_logs_nothing():
    module = seeded(lambda: Net(on_nonfinite="skip"))
    with pytest.warns(UserWarning, match="Skipped an outer step") as warned:
        trainer(
            ReverseUnroll(), barebones=True, logger=None, enable_progress_bar=None, enable_model_summary=None,
            enable_checkpointing=None,
        ).fit(module, listed(episodes((0, "inner"), (3, "inner"))))  # fmt: skip
    assert sum("Skipped an outer step" in str(each.message) for each in warned) == 1
    assert module.fit_context.memory.skipped == 2
