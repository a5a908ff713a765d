"""The audit says which strategies work on a module, names the operation where one does not, and leaves no trace."""

from __future__ import annotations

import copy
import os
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric

from lightning_bilevel import (
    FSLA,
    PZOBO,
    SGD,
    Adam,
    BilevelModule,
    Episode,
    FirstOrder,
    ForwardGradient,
    ForwardUnroll,
    HypergradientSchedule,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    StrategyAudit,
    TruncatedReverse,
    ZerothOrder,
    audit,
    bilevel,
)
from lightning_bilevel.auditing import Audit
from lightning_bilevel.auditing.diagnosis import diagnose, split_message
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Neumann
from tests.support.modules import (
    Cleaning,
    Maml,
    differing,
    examples,
    identical,
    listed,
    loader,
    parameters,
    seeded,
    tasks,
    trainer,
)
from tests.support.problems import RidgeBlackBox, RidgeSolver

SECOND_ORDER = ("ReverseUnroll", "TruncatedReverse", "ForwardUnroll", "ForwardGradient", "ImplicitGradient")
FORWARD = "ForwardGradient(mode='forward')"
PERTURBED = ("PZOBO", "ZerothOrder")


class Net(BilevelModule):
    """Example weights and a net, with an operation on the net's output.

    Args:
        act: the operation, in both losses.
        options: of ``BilevelModule``.
    """

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.tanh, net: nn.Module | None = None, **options: Any):
        super().__init__(**{"inner_steps": 50, "inner_start": "reset", **options})
        self.net = net or seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
        self.weights = nn.Parameter(torch.zeros(8))
        self.act = act

    def inner_parameters(self) -> Any:
        return self.net.parameters()

    def inner_loss(self, batch: Any) -> Tensor:
        return (self.weights.sigmoid() * self.error(batch)).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return self.error(batch).mean()

    def error(self, batch: Any) -> Tensor:
        return (self.act(self.net(batch[0])) - batch[1]).square().mean(1)

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.outer_parameters(), lr=0.1)


EPISODE = Episode([examples(0)[:2]], examples(1)[:2])


def quiet(module: BilevelModule, batch: Any = EPISODE, *args: Any, **options: Any) -> Audit:
    return audit(module, batch, *args, verbose=False, **options)


# --- What works ---


def test_a_module_on_which_everything_works(capsys: pytest.CaptureFixture[str]) -> None:
    module = Cleaning(inner_steps=100, optimizer=lambda lr: SGD(lr=lr))
    report = audit(module, Episode([examples(0)], examples(1)[:2]))
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert printed.startswith("Audit of `Cleaning`: every strategy took 2 of 100 inner steps.")
    verdicts = {row.strategy.partition("(")[0]: row.verdict for row in report.rows}
    assert verdicts == {
        **dict.fromkeys([*SECOND_ORDER, "GammaGreedy", *PERTURBED], "yes"),
        "FirstOrder": "zero",
        "ImplicitGradient": "refused",  # the learning rate is learned
        "FSLA": "refused",
    }
    assert report[FORWARD].works
    assert report["ReverseUnroll"].cosine == pytest.approx(1)
    assert report["ForwardUnroll"].cosine == pytest.approx(1)
    assert report[FORWARD].cosine is None
    assert all((row.seconds is not None) == (row.verdict != "refused") for row in report.rows)
    assert report.vectorizes
    assert "can be vectorized over episodes." in printed
    assert "look" not in report["ReverseUnroll"].advice
    assert "`HypergradientMonitor` shows the cosine at 100" in printed.replace("\n", " ")
    assert repr(report) == "<Audit of Cleaning: 8 of 11 strategies work>"
    assert max(map(len, printed.splitlines())) <= 124


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


def test_shared_parameters_and_several_episodes() -> None:
    report = quiet(Maml(inner_steps=4), tasks(3))
    assert report["FirstOrder"].works
    assert 0.5 < report["FirstOrder"].cosine < 1
    assert report["ReverseUnroll"].works
    assert report["ImplicitGradient"].verdict == "refused"
    assert report["ImplicitGradient"].reason.startswith(
        "parameters shared by both levels and `proximal=0`: the minimum"
    )
    # In a batch of several, F.mse_loss is a mean over each episode.
    assert report.vectorizes


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

    strategy = Second()
    assert quiet(Net(inner_start="warm", inner_steps=1), EPISODE, [strategy])["Second"].works
    assert seen[:2] == [False, True]
    assert strategy._tracked is None


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


def test_memory_per_step_is_what_autograd_saves() -> None:
    class Product(Net):
        """g = ½ Σ (θ w)², whose first gradient θ w² and second one save a few vectors of 1000."""

        def __init__(self, size: int) -> None:
            super().__init__(net=nn.Linear(size, 1, bias=False))

        def inner_loss(self, batch: Any) -> Tensor:
            return 0.5 * (self.net.weight * self.weights.sum()).square().sum()

        def outer_loss(self, batch: Any) -> Tensor:
            return self.net.weight.sum()

    small, large = (quiet(Product(size), EPISODE, [ReverseUnroll()]).step_bytes for size in (1000, 2000))
    assert (large - small) % 4000 == 0
    assert 1 <= (large - small) / 4000 <= 8
    text = " ".join(str(quiet(Product(10**5), EPISODE, [ReverseUnroll()])).split())
    assert re.search(
        r"Reverse mode saves at least [\d.]+ (KiB|MiB) per inner step and episode: [\d.]+ MiB in all,", text
    )


def test_solvers() -> None:
    module = RidgeSolver()
    report = quiet(module, module.episode())
    assert report["ReverseUnroll"].works
    assert report["TruncatedReverse"].reason == "`solve_inner`: your solver has no inner steps"
    assert "Episodes" not in str(report)
    assert "`solve_inner` takes one" in str(report)
    assert report.vectorizes is None
    module = RidgeBlackBox()
    report = quiet(module, module.episode())
    assert report["ReverseUnroll"].verdict == "refused"
    assert report["PZOBO"].works
    assert report["ZerothOrder"].works


def test_a_wrapped_module() -> None:
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.penalty = seeded(lambda: nn.Linear(3, 1)), nn.Parameter(torch.zeros(3))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = (self.net(batch[0]) - batch[1]).square().mean() + (self.penalty.exp() * self.net.weight**2).sum()
            self.log("loss", loss)
            return loss

    module = bilevel(Plain(), inner="net.*", outer="penalty", inner_optimizer=SGD(lr=0.1), inner_start="reset")
    report = quiet(module)
    assert report["ReverseUnroll"].works
    assert report[FORWARD].works


# --- What does not, because of which operation ---


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Detached(torch.autograd.Function):
    """x², whose backward hides that it depends on x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0].detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].detach() * grad.detach()


def distances(x: Tensor) -> Tensor:
    return torch.cdist(x, x)  # here: distances


def sampled(x: Tensor) -> Tensor:
    image, grid = x.view(1, 1, 8, 1).expand(1, 1, 8, 8), x.tanh().view(1, 8, 1, 1).expand(1, 8, 8, 2)
    return x + F.grid_sample(image, grid, align_corners=False).mean()  # here: sampled


def aligned(x: Tensor) -> Tensor:
    log_probs = torch.cat([x, -x, 2 * x], 1).log_softmax(1).unsqueeze(1)
    return x + F.ctc_loss(log_probs, torch.tensor([[1, 2]]), torch.tensor([8]), torch.tensor([2]))  # here: aligned


def huber(x: Tensor) -> Tensor:
    return F.huber_loss(x, torch.ones_like(x), reduction="none")  # here: huber


def mean_squared(x: Tensor) -> Tensor:
    return x + F.mse_loss(x, torch.ones_like(x))  # here: mean_squared


def overwritten(x: Tensor) -> Tensor:
    y = x.exp()  # here: overwritten
    y.mul_(2)
    return y


def branching(x: Tensor) -> Tensor:
    return 2 * x if x.sum().item() > 0 else 3 * x  # here: branching


def recomputed(x: Tensor) -> Tensor:
    return checkpoint(torch.tanh, x, use_reentrant=False)  # here: recomputed


def once(x: Tensor) -> Tensor:
    return Once.apply(x)  # here: once


def line(function: Callable[..., Any]) -> str:
    """Return where the remark with a function's name stands."""
    with open(__file__, encoding="utf-8") as file:
        numbers = [i for i, text in enumerate(file, 1) if text.rstrip().endswith(f"# here: {function.__name__}")]
    return f"test_audit.py:{numbers[0]}"


def failing(report: Audit) -> set[str]:
    names = {
        row.strategy.partition("(")[0] if row.strategy != FORWARD else FORWARD for row in report.rows if row.reason
    }
    return names - {"FirstOrder", "FSLA"}


@pytest.mark.parametrize(
    ("act", "operation"),
    [(distances, "cdist"), (aligned, "ctc_loss")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_no_second_derivative(act: Any, operation: str) -> None:
    report = quiet(Net(act))
    for name in (*SECOND_ORDER, "GammaGreedy"):
        row = report[name]
        assert (row.verdict, row.operation, row.where) == ("no", operation, line(act))
        assert row.reason == f"`{operation}` has no second derivative"
        assert row.advice.startswith(
            f"Write `{operation}` with elementary operations, or use a strategy without second"
        )
    assert report[FORWARD].reason == f"`{operation}` has no forward-mode derivative"
    assert report["PZOBO"].works
    assert report["ZerothOrder"].works
    assert f"has no second derivative ({line(act)})" in " ".join(str(report).split()) or operation in str(report)
    assert "as ReverseUnroll()" in str(report)


@pytest.mark.parametrize(
    ("act", "operation"),
    [(sampled, "grid_sampler_2d"), (huber, "huber_loss"), (mean_squared, "mse_loss")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_no_forward_mode(act: Any, operation: str) -> None:
    report = quiet(Net(act))
    row = report[FORWARD]
    assert failing(report) == {FORWARD}
    assert (row.verdict, row.operation, row.where) == ("no", operation, line(act))
    assert f"`{operation}`" in row.reason
    assert row.advice == "Use `ForwardGradient(..., mode='double_backward')`, which works here."


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (branching, "Python looks at the value of a tensor, which has many values where it is vectorized"),
        (recomputed, "`torch.utils.checkpoint` does not work inside function transforms"),
    ],
    ids=["branching", "recomputed"],
)
def test_cannot_be_vectorized(act: Any, reason: str) -> None:
    report = quiet(Net(act))
    assert all(report[name].works for name in PERTURBED)  # looped
    assert not report.vectorizes
    assert f"cannot be vectorized over episodes, so these are looped: {reason}" in " ".join(str(report).split())
    assert report["ReverseUnroll"].works


def recomputed_by_itself(x: Tensor) -> Tensor:
    return checkpoint(torch.tanh, x, use_reentrant=True)  # here: recomputed_by_itself


def test_reentrant_checkpoints() -> None:
    row = quiet(Net(recomputed_by_itself))["ReverseUnroll"]
    assert (row.verdict, row.operation, row.where) == ("no", "torch.utils.checkpoint", line(recomputed_by_itself))
    assert row.advice == "Pass `use_reentrant=False`."


def test_batches_with_other_things_than_tensors() -> None:
    report = quiet(Net(), Episode([(*examples(0)[:2], "a name")], examples(1)[:2]))
    assert report.vectorizes is False
    assert "batches have entries that are no tensors" in str(report)
    assert report["PZOBO"].works


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.unsqueeze(-1))[0][:, -1])


def test_an_rnn() -> None:
    report = quiet(Net(net=seeded(Recurrent)))
    assert failing(report) == set()
    assert report.vectorizes is False


def test_batch_norm_is_no_obstacle() -> None:
    module = Net(net=seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))))
    before = parameters(module)
    report = quiet(module)
    assert failing(report) == set()
    assert differing(before, parameters(module)) == []


def test_an_operation_in_place_stops_everything() -> None:
    report = quiet(Net(overwritten))
    for row in report.rows:
        if row.verdict != "refused":
            assert (row.verdict, row.operation, row.where) == ("no", "exp", line(overwritten))
    assert report.vectorizes is None
    assert report.notes == (
        f"Not even first derivatives work: what `exp` keeps for its backward pass is changed in place "
        f"({line(overwritten)}). Write the operation after `exp` out of place: `x = x * 2` for `x.mul_(2)`.",
    )


def test_a_function_that_is_differentiable_once_is_found_though_nothing_raises() -> None:
    report = quiet(Net(once))
    for name in (*SECOND_ORDER, "GammaGreedy"):
        row = report[name]
        assert (row.verdict, row.operation, row.where) == ("doubtful", "Once", line(once))
        assert row.reason == "`Once` is marked `once_differentiable`: its second derivative is left out in silence"
    assert report[FORWARD].reason == "`Once` is an `autograd.Function` that function transforms cannot enter"
    assert report[FORWARD].advice.startswith("Give it `setup_context`")  # the other engine is no way out
    assert report["PZOBO"].works
    assert report["FirstOrder"].verdict == "zero"


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


def test_nan_is_traced() -> None:
    report = quiet(Net(lambda x: x + (0 * x).sqrt()))
    row = report["ReverseUnroll"]
    assert row.verdict == "not finite"
    assert row.reason.startswith("the inner loss at step 2 of 2 is nan, which the backward pass of `")
    assert row.where.startswith("test_audit.py:")
    assert row.advice == "Lower the inner learning rate, or take fewer inner steps."


def test_an_outer_loss_without_a_gradient() -> None:
    class Accuracy(Net):
        def outer_loss(self, batch: Any) -> Tensor:
            return (self.net(batch[0]).round() == batch[1].round()).float().mean()

    report = quiet(Accuracy())
    assert report["ReverseUnroll"].reason == "it runs, but gives zero for `weights`: the outer loss has no gradient"
    assert report["ReverseUnroll"].advice == ""
    assert report.notes[0].startswith("The outer loss has no gradient: it is cut off from the parameters. Look for")

    class Count(Net):
        def outer_loss(self, batch: Any) -> Tensor:
            return (self.net(batch[0]) > batch[1]).sum()

    assert "floating-point numbers, got 'a tensor of torch.int64'" in quiet(Count()).notes[0]


def test_losses_that_leave_an_outer_parameter_out() -> None:
    class Forgotten(Net):
        def inner_loss(self, batch: Any) -> Tensor:
            return self.error(batch).mean()

    report = quiet(Forgotten())
    assert {row.verdict for row in report.rows} == {"refused"}
    assert report.notes[0].startswith("Not even first derivatives work: `Forgotten` has no loss that depends on the")


def test_a_bug_in_a_loss_is_told_with_its_line() -> None:
    class Buggy(Net):
        def outer_loss(self, batch: Any) -> Tensor:
            return batch["x"]  # here: test_a_bug_in_a_loss_is_told_with_its_line

    report = quiet(Buggy())
    assert report["ReverseUnroll"].reason.startswith("TypeError: tuple indices must be integers")
    assert report["ReverseUnroll"].where == line(test_a_bug_in_a_loss_is_told_with_its_line)


class Broken(HypergradientStrategy):
    """A strategy that does not work."""

    exact = unbiased = second_order = False
    requires = "solve"
    memory = cost = "none"

    def estimate(self, *args: Any) -> Any:
        raise RuntimeError("the widget is missing\nand more")


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


def test_a_compiled_net() -> None:
    """Forward mode leaves what it met uncompiled, so that the order of the rows must not matter."""
    net = torch.compile(seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))), backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile about itself
        report = quiet(Net(net=net), EPISODE, [ForwardGradient(mode="forward"), PZOBO(2), ReverseUnroll()])
    assert [row.verdict for row in report.rows] == ["yes", "yes", "no"]
    assert report["ReverseUnroll"].operation == "torch.compile"
    assert report["ReverseUnroll"].reason == "a compiled function has no second derivative"
    assert report["ReverseUnroll"].where.startswith("test_audit.py:")


def test_messages_of_this_package_are_split() -> None:
    assert split_message("Expected the loss to be finite, got nan. Lower it. (Hypergradient strategy: `X`.)") == (
        "the loss is nan",
        "Lower it.",
    )
    assert split_message("Cannot use A. This is because b. Use C.\nCannot use D. This is because e. Use C.") == (
        "A: b; D: e",
        "Use C.",
    )
    assert split_message("No full stop") == ("No full stop", "")


def test_an_error_that_comes_once_only_is_still_told() -> None:
    try:
        raise RuntimeError("derivative for aten::_fancy_backward is not implemented")
    except RuntimeError as error:
        found = diagnose(error, lambda: None)
    assert (found.operation, found.where) == ("fancy", "")


# --- Nothing changes ---


class Noisy(Cleaning):
    """Draws from every generator, keeps statistics, logs and counts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            net=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.4), nn.Tanh(), nn.Linear(4, 1)),
            **options,
        )
        self.mean = MeanMetric()

    def inner_loss(self, batch: Any) -> Tensor:
        loss = super().inner_loss(batch)
        self.log("inner", loss)
        self.mean.update(loss.detach())
        return loss * (1 + 1e-3 * random.random() + 1e-3 * np.random.rand())


def test_nothing_in_the_module_changes() -> None:
    module = seeded(Noisy)
    module.example_weights.grad = torch.ones(8)
    module.net[2].eval()
    tensors, flags = parameters(module), [p.requires_grad for p in module.parameters()]
    modes = [child.training for child in module.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    attributes = set(vars(module))
    report = quiet(module, Episode([examples(0)], examples(1)[:2]))
    assert any(row.works for row in report.rows)
    assert differing(tensors, parameters(module)) == []
    assert flags == [p.requires_grad for p in module.parameters()]
    assert modes == [child.training for child in module.modules()]
    assert torch.equal(module.example_weights.grad, torch.ones(8))
    assert [name for name, p in module.named_parameters() if p.grad is not None] == ["example_weights"]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])
    assert set(vars(module)) == attributes
    assert module.mean._update_count == 0
    assert not torch.is_anomaly_enabled()


def test_the_strategies_are_left_as_they_are() -> None:
    strategies = [ForwardGradient(7), FSLA(), ZerothOrder(mu=1e-9)]
    before = [copy.deepcopy(vars(strategy)) for strategy in strategies]
    quiet(Net(inner_start="warm", inner_steps=1), EPISODE, strategies)
    for state, strategy in zip(before, strategies, strict=True):
        assert {k: v for k, v in state.items() if k != "directions"} == {
            k: v for k, v in vars(strategy).items() if k != "directions"
        }


def test_an_audit_repeats_itself() -> None:
    module, batch = seeded(Noisy), Episode([examples(0)], examples(1)[:2])
    one, other = ([(r.verdict, r.cosine) for r in quiet(module, batch).rows] for _ in range(2))
    assert one == other


class Final(Callback):
    """Keeps what a fit leads to."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.generators = torch.get_rng_state(), random.getstate(), list(np.random.get_state()[1])
        self.tensors, self.metrics = parameters(pl_module), dict(trainer.callback_metrics)
        self.inner = pl_module.inner_state_dict()


def fit(strategy: HypergradientStrategy, *callbacks: Callback, batches: Any = None, **options: Any) -> Final:
    final = Final()
    module = seeded(lambda: Noisy(**options))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        trainer(*callbacks, strategy, final).fit(module, batches or loader(shuffle=True))
    return final


@pytest.mark.parametrize(
    "make",
    [
        ReverseUnroll,
        lambda: ForwardGradient(3, guide=TruncatedReverse(1)),
        lambda: PZOBO(2, mu=0.1),
        lambda: HypergradientSchedule([(ForwardGradient(2), 2), (ReverseUnroll(), None)]),
    ],
    ids=["ReverseUnroll", "guided", "PZOBO", "schedule"],
)
def test_a_fit_is_the_same_bit_for_bit(make: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> None:
    plain, audited = fit(make()), fit(make(), StrategyAudit())
    assert differing(plain.tensors, audited.tensors) == []
    assert identical(plain.generators, audited.generators)
    assert identical(plain.metrics, audited.metrics)
    assert identical(plain.inner, audited.inner)
    assert capsys.readouterr().out.count("Audit of `Noisy`") == 1


# --- The callback ---


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_its_place_among_the_callbacks_does_not_matter(first: bool, capsys: pytest.CaptureFixture[str]) -> None:
    spy, module = StrategyAudit(), seeded(Cleaning)
    callbacks = [spy, TruncatedReverse(2)] if first else [TruncatedReverse(2), spy]
    trainer(*callbacks, max_epochs=2).fit(module, loader())
    printed = capsys.readouterr().out
    assert printed.count("Audit of `Cleaning`") == 1
    assert "This fit runs `TruncatedReverse(steps=2)`." in printed
    names = [row.strategy for row in spy.report.rows]
    assert names[0] == "TruncatedReverse(steps=2)"
    assert "TruncatedReverse()" not in names
    assert len(names) == 11


def test_a_second_fit_is_audited_anew(capsys: pytest.CaptureFixture[str]) -> None:
    spy, module = StrategyAudit([FirstOrder()]), seeded(Cleaning)
    for _ in range(2):
        trainer(spy, ReverseUnroll(), max_steps=1).fit(module, loader())
    assert capsys.readouterr().out.count("Audit of") == 2
    assert [row.strategy for row in spy.report.rows] == ["ReverseUnroll()", "FirstOrder()"]


class Steps(Callback):
    """Counts training steps."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.count += 1


def test_a_fit_whose_strategy_does_not_work_stops() -> None:
    steps, module = Steps(), Net(distances)
    flags = [p.requires_grad for p in module.parameters()]
    message = (
        r"^`ReverseUnroll\(\)` does not work on `Net`\. This is because `cdist` has no second derivative "
        rf"\({line(distances)}\)\. Write `cdist` with .*\nWhat works here: PZOBO\(num_directions=2\), ZerothOrder\("
    )
    with pytest.raises(MisconfigurationError, match=message):
        trainer(ReverseUnroll(), StrategyAudit(), steps).fit(module, listed([EPISODE]))
    assert steps.count == 0
    assert [p.requires_grad for p in module.parameters()] == flags


def test_a_fit_whose_strategy_works_goes_on_whatever_else_fails() -> None:
    steps = Steps()
    trainer(PZOBO(3), StrategyAudit(), steps).fit(Net(distances), listed([EPISODE] * 2))
    assert steps.count == 2


def test_a_fit_whose_strategy_is_doubtful_goes_on_with_a_warning() -> None:
    steps = Steps()
    doubtful = pytest.warns(
        UserWarning, match=r"^`ReverseUnroll\(\)` may be wrong on `Net`: it disagrees with a finite"
    )
    with doubtful, pytest.warns(UserWarning, match=r"^The first hypergradient is exactly zero"):
        trainer(ReverseUnroll(), StrategyAudit([FirstOrder()]), steps).fit(Net(Detached.apply), listed([EPISODE]))
    assert steps.count == 1


def test_a_running_strategy_that_is_broken_stops_the_fit() -> None:
    with pytest.raises(MisconfigurationError, match=r"^`Broken\(\)` does not work on `Net`\. This is because Runtime"):
        trainer(Broken(), StrategyAudit([Broken()])).fit(Net(), listed([EPISODE]))


TWO_PROCESSES = """
import sys
import pytorch_lightning as pl
import torch
from lightning_bilevel import ForwardGradient, ReverseUnroll, StrategyAudit
from tests.support.modules import Cleaning, loader

torch.manual_seed(0)
quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
quiet |= {"strategy": sys.argv[1], "accelerator": "cpu", "devices": 2, "max_epochs": 1}
spy, module = StrategyAudit([ReverseUnroll()]), Cleaning(inner_start="reset")
strategy = ReverseUnroll() if sys.argv[1] == "ddp" else ForwardGradient(2)
trainer = pl.Trainer(callbacks=[spy, strategy], **quiet)
trainer.fit(module, loader())
assert spy.report is not None
everywhere = trainer.strategy.all_gather(module.example_weights.detach())
assert torch.equal(everywhere[0], everywhere[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_directions"])
def test_two_processes_print_once(strategy: str, tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "MASTER_", "LOCAL_"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), strategy],
        env={**keep, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Audit of `Cleaning`") == 1


def test_a_fit_stops_in_every_process_if_it_does_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    running = trainer(ReverseUnroll(), StrategyAudit([FirstOrder()]))
    monkeypatch.setattr(running.strategy, "reduce_boolean_decision", lambda decision: False)
    with pytest.raises(MisconfigurationError, match="^The strategy of this fit does not work on the first batch of an"):
        running.fit(Net(), listed([EPISODE]))


def test_mixed_precision_is_that_of_the_fit() -> None:
    seen = []

    class Cast(Net):
        def error(self, batch: Any) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().error(batch)

    spy = StrategyAudit()
    trainer(ReverseUnroll(), spy, precision="bf16-mixed").fit(Cast(), listed([EPISODE]))
    assert set(seen) == {True}
    assert spy.report["ReverseUnroll"].works


def test_during_a_fit_warm_state_is_seen_and_kept() -> None:
    reports = []

    class Midway(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            before = copy.deepcopy(pl_module.inner_state_dict())
            reports.append(quiet(pl_module, batch))
            assert identical(before, pl_module.inner_state_dict())

    trainer(ReverseUnroll(), Midway()).fit(seeded(Cleaning), loader())
    assert len(reports) == 4
    assert all(report["ReverseUnroll"].works for report in reports)


# --- Devices ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    module = Net().to("cuda")
    report = quiet(module)
    assert failing(report) == set()
    assert {p.device.type for p in module.parameters()} == {"cuda"}


# --- Misuse ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (nn.Linear(1, 1), EPISODE),
            MisconfigurationError,
            "^`Linear` has no inner and outer level. `audit` works on a",
        ),
        ((BilevelModule(), EPISODE), MisconfigurationError, "^`BilevelModule` has no `inner_parameters`"),
        ((Net(), 3), ValueError, "^Expected `the training batch` to be an `Episode`, a list of them, or a mapping"),
        ((Net(), EPISODE, []), ValueError, r"^Expected `audit\(strategies=\.\.\.\)` to be a list such as"),
        ((Net(), EPISODE, ReverseUnroll()), ValueError, r"^Expected `audit\(strategies=\.\.\.\)` to be a list such as"),
        (
            (Net(), EPISODE, [ReverseUnroll]),
            ValueError,
            r"^Expected `audit\(strategies=\.\.\.\)` to be a list of hyperg",
        ),
    ],
    ids=["module", "hooks", "batch", "empty", "single", "class"],
)
def test_misuse(arguments: Sequence[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        audit(*arguments)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_bad_steps(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"^Expected `audit\(steps=\.\.\.\)` to be a positive integer, got"):
        audit(Net(), EPISODE, steps=steps)
    with pytest.raises(ValueError, match=r"^Expected `StrategyAudit\(steps=\.\.\.\)` to be a positive integer, got"):
        StrategyAudit(steps=steps)


def test_a_batch_without_episodes() -> None:
    class Empty(Net):
        def episodes(self, batch: Any) -> list[Episode]:
            return []

    with pytest.raises(ValueError, match=r"^Expected `audit\(batch=\.\.\.\)` to be at least one episode, got"):
        audit(Empty(), EPISODE)


def test_bad_strategies_of_the_callback() -> None:
    with pytest.raises(
        ValueError, match=r"^Expected `StrategyAudit\(strategies=\.\.\.\)` to be a list of hypergradient"
    ):
        StrategyAudit([Callback()])


def test_a_plain_module_has_nothing_to_audit() -> None:
    class Plain(LightningModule):
        def training_step(self, batch: Any) -> None: ...

        def configure_optimizers(self) -> None: ...

    with pytest.raises(MisconfigurationError, match="^`Plain` has no inner and outer level. `StrategyAudit` works on"):
        trainer(StrategyAudit()).fit(Plain(), listed([EPISODE]))


def test_a_row_by_name() -> None:
    report = quiet(Net(), EPISODE, [ReverseUnroll(), ImplicitGradient(Neumann(2, step_size=0.1))])
    assert report["ImplicitGradient"] is report["ImplicitGradient(Neumann(...))"]
    with pytest.raises(KeyError, match="FSLA is not among"):
        report["FSLA"]


def test_one_step_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    audit(Net(inner_steps=1), EPISODE, [ReverseUnroll()])
    printed = capsys.readouterr().out
    assert printed.startswith("Audit of `Net`: every strategy took 1 inner step.")
    assert "HypergradientMonitor" not in printed
