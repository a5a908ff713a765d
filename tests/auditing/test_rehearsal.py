"""Every strategy is rehearsed on a few steps: what counts as working, as zero, as refused and as doubtful."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import (
    FSLA,
    PZOBO,
    Adam,
    Episode,
    FirstOrder,
    ForwardGradient,
    ForwardUnroll,
    HypergradientSchedule,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
)
from tests.support.audits import EPISODE, Broken, Net, quiet
from tests.support.functions import Detached
from tests.support.modules import Cleaning, Maml, examples
from tests.support.seeds import seeded


def test_an_estimate_of_zero_is_told_with_its_parameters() -> None:
    row = quiet(Cleaning(), Episode([examples(0)], examples(1)[:2]))["FirstOrder"]
    assert row.zero == ("example_weights", "log_lr")
    assert row.reason == "it runs, but gives zero for `example_weights`, `log_lr`"
    assert row.advice == "Use a strategy that sees how they act on the inner steps."


def test_a_zero_that_is_right_is_told_as_such() -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Parameter(torch.zeros(1))

        def inner_loss(self, batch: Any) -> Tensor:
            return super().inner_loss(batch) + 0 * self.extra.sum()

    row = quiet(Late())["ReverseUnroll"]
    assert (row.zero, row.verdict) == (("extra",), "zero")
    assert row.reason == "it runs, but gives zero for `extra`, as does the exact one over these steps"


def test_what_an_adam_step_carries_takes_part() -> None:
    # After one step of Adam θ hardly depends on the size of the gradient; after two it does.
    report = quiet(Cleaning(optimizer=lambda lr: Adam(lr=lr)), Episode([examples(0)], examples(1)[:2]))
    assert report["ReverseUnroll"].works
    assert report.steps == 2


def test_the_refusals_are_those_of_the_whole_run() -> None:
    row = quiet(Net(inner_start="warm"))["FSLA"]
    assert row.reason == "`inner_steps=50`: it takes one inner step per outer step"
    assert row.advice == "Use `inner_steps=1`."
    assert quiet(Net(inner_start="warm", inner_steps=1))["FSLA"].works


def test_a_strategy_that_carries_something_is_rehearsed_twice() -> None:
    seen = []

    class Second(FSLA):
        def _linear_step(
            self, problem: Any, before: Any, phi: Any, episode: Any, batch: Any, last: Any, beta: Any
        ) -> Any:
            seen.append(last is not None)
            return super()._linear_step(problem, before, phi, episode, batch, last, beta)

    module = Net(inner_start="warm", inner_steps=1)
    assert quiet(module, EPISODE, [Second()])["Second"].works
    assert seen[:2] == [False, True]
    assert module.fit_context.memory.strategy == {}  # a fit does not go on from a rehearsal


def test_only_a_few_directions_are_rehearsed() -> None:
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.many = nn.Parameter(torch.zeros(5000))

        def inner_loss(self, batch: Any) -> Tensor:
            return super().inner_loss(batch) + self.many.sum() * self.net[0].weight.sum()

    columns = []

    class Counted(PZOBO):
        def estimate(self, *args: Any) -> Any:
            columns.append(self.num_directions)
            return super().estimate(*args)

    strategies = [ForwardUnroll(), ForwardGradient(4096), Counted(512)]
    report = quiet(Wide(), EPISODE, strategies)
    assert [row.verdict for row in report.rows] == ["yes"] * 3
    assert report["ForwardUnroll"].cosine is None  # one direction stands for 5008 columns
    assert set(columns) == {2}
    assert strategies[2].num_directions == 512


def test_a_guide_takes_part() -> None:
    report = quiet(Net(), EPISODE, [ForwardGradient(8, guide=TruncatedReverse(3))])
    assert report.rows[0].strategy == "ForwardGradient(num_directions=8, guide=TruncatedReverse(steps=3))"
    assert report.rows[0].works
    report = quiet(Net(lambda x: torch.cdist(x, x)), EPISODE, [ForwardGradient(8, guide=TruncatedReverse(3))])
    assert report.rows[0].operation == "cdist"


def test_phases_of_a_schedule_are_rows() -> None:
    inner = HypergradientSchedule([(FirstOrder(), 3), (TruncatedReverse(4), None)])
    report = quiet(Net(), EPISODE, [HypergradientSchedule([(inner, 5), (ReverseUnroll("sqrt"), None)])])
    assert [row.strategy for row in report.rows] == [
        "FirstOrder()",
        "TruncatedReverse(steps=4)",
        "ReverseUnroll(checkpoint='sqrt')",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_wrong_second_derivative_is_doubted(dtype: torch.dtype) -> None:
    episode = Episode([examples(0, dtype=dtype)[:2]], examples(1, dtype=dtype)[:2])
    report = quiet(Net(Detached.apply).to(dtype), episode)
    assert report["ReverseUnroll"].verdict == "doubtful"
    assert report["ReverseUnroll"].reason == "it disagrees with a finite difference of the outer loss"
    assert report["ForwardGradient"].verdict == "doubtful"
    assert report["GammaGreedy"].reason == "it differentiates the losses twice, and `ReverseUnroll()` is doubtful"
    assert report["PZOBO"].works
    assert report["ZerothOrder"].works
    assert all(row.cosine is None for row in report.rows)


def test_where_finite_differences_disagree_among_themselves_nothing_is_doubted() -> None:
    class Wild(Net):
        def outer_loss(self, batch: Any) -> Tensor:
            return super().outer_loss(batch) + (1e4 * self.weights).sin().sum()

    rows = quiet(Wild()).rows
    assert [row.verdict for row in rows if row.verdict not in ("yes", "refused")] == []


@pytest.mark.parametrize("net", [Cleaning, Net, Maml], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_right_is_not_doubted(net: Any, seed: int) -> None:
    batch = Episode([examples(0)[: 2 if net is not Cleaning else 3]], examples(1)[:2])
    module = seeded(net, seed)
    with torch.no_grad():
        for parameter in module.outer_parameters() if net is not Maml else []:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    report = quiet(module, batch, seed=seed)
    assert [row.strategy for row in report.rows if row.verdict == "doubtful"] == []


def test_losses_that_leave_an_outer_parameter_out() -> None:
    class Forgotten(Net):
        def inner_loss(self, batch: Any) -> Tensor:
            return self.error(batch).mean()

    report = quiet(Forgotten())
    assert {row.verdict for row in report.rows} == {"refused"}
    assert report.notes[0].startswith("Not even first derivatives work: `Forgotten` has no loss that depends on the")


def test_an_outer_parameter_that_these_episodes_do_not_read() -> None:
    class Spare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = torch.nn.Parameter(torch.zeros(()))

    report = quiet(Spare())
    assert report["ReverseUnroll"].verdict == "zero"
    assert report["ReverseUnroll"].zero == ("spare",)
    assert "These episodes do not read the outer parameters ['spare']: their estimates are zero." in report.notes


def test_a_broken_strategy() -> None:
    report = quiet(Net(), EPISODE, [Broken(), ReverseUnroll()])
    assert [row.verdict for row in report.rows] == ["no", "yes"]
    assert report["Broken"].reason == "RuntimeError: the widget is missing"


def test_a_strategy_that_gives_nonsense_is_doubted() -> None:
    class Wrong(ReverseUnroll):
        def estimate(self, *args: Any) -> Any:
            result = super().estimate(*args)
            return result._replace(grads={name: 1.5 * value for name, value in result.grads.items()})

    row = quiet(Net(), EPISODE, [Wrong()])["Wrong"]
    assert (row.verdict, row.reason) == ("doubtful", "it claims to be exact and differs from `ReverseUnroll`")


def test_the_strategies_are_left_as_they_are() -> None:
    strategies = [ForwardGradient(7), FSLA(), ZerothOrder(mu=1e-9)]
    before = [copy.deepcopy(vars(strategy)) for strategy in strategies]
    quiet(Net(inner_start="warm", inner_steps=1), EPISODE, strategies)
    for state, strategy in zip(before, strategies, strict=True):
        assert {k: v for k, v in state.items() if k != "directions"} == {
            k: v for k, v in vars(strategy).items() if k != "directions"
        }
