"""Where a strategy does not work, the operation is named, with its line and a way out."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bilevel import PZOBO, ForwardGradient, ReverseUnroll
from lightning_bilevel.auditing.diagnosis import diagnose, explained
from lightning_bilevel.errors import combination_error, nonfinite_error, report
from tests.support.audits import EPISODE, FORWARD, SECOND_ORDER, Net, distances, failing, line, quiet
from tests.support.functions import Once
from tests.support.seeds import seeded


def sampled(x: Tensor) -> Tensor:
    image, grid = x.view(1, 1, 8, 1).expand(1, 1, 8, 8), x.tanh().view(1, 8, 1, 1).expand(1, 8, 8, 2)
    return x + F.grid_sample(image, grid, align_corners=False).mean()  # here: sampled


def aligned(x: Tensor) -> Tensor:
    log_probs = torch.cat([x, -x, 2 * x], 1).log_softmax(1).unsqueeze(1)
    return x + F.ctc_loss(log_probs, torch.tensor([[1, 2]]), torch.tensor([8]), torch.tensor([2]))  # here: aligned


def huber(x: Tensor) -> Tensor:
    return torch.ops.aten.huber_loss(x, torch.ones_like(x), 0)  # here: huber


def mean_squared(x: Tensor) -> Tensor:
    return x + torch.ops.aten.mse_loss(x, torch.ones_like(x))  # here: mean_squared


def overwritten(x: Tensor) -> Tensor:
    y = x.exp()  # here: overwritten
    y.mul_(2)
    return y


def once(x: Tensor) -> Tensor:
    return Once.apply(x)  # here: once


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


def recomputed_by_itself(x: Tensor) -> Tensor:
    return checkpoint(torch.tanh, x, use_reentrant=True)  # here: recomputed_by_itself


def test_reentrant_checkpoints() -> None:
    row = quiet(Net(recomputed_by_itself))["ReverseUnroll"]
    assert (row.verdict, row.operation, row.where) == ("no", "torch.utils.checkpoint", line(recomputed_by_itself))
    assert row.advice == "Pass `use_reentrant=False`."


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


def test_nan_is_traced() -> None:
    report = quiet(Net(lambda x: x + (0 * x).sqrt()))
    row = report["ReverseUnroll"]
    assert row.verdict == "not finite"
    assert row.reason.startswith("the inner loss at step 2 of 2 is nan, which the backward pass of `")
    assert row.where.startswith("test_diagnosis.py:")
    assert row.advice == "Lower the inner learning rate, or take fewer inner steps."


def test_a_bug_in_a_loss_is_told_with_its_line() -> None:
    class Buggy(Net):
        def outer_loss(self, batch: Any) -> Tensor:
            return batch["x"]  # here: test_a_bug_in_a_loss_is_told_with_its_line

    report = quiet(Buggy())
    assert report["ReverseUnroll"].reason.startswith("TypeError: tuple indices must be integers")
    assert report["ReverseUnroll"].where == line(test_a_bug_in_a_loss_is_told_with_its_line)


def test_a_compiled_net() -> None:
    """Forward mode leaves what it met uncompiled, so that the order of the rows must not matter."""
    net = torch.compile(seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))), backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile about itself
        report = quiet(Net(net=net), EPISODE, [ForwardGradient(mode="forward"), PZOBO(2), ReverseUnroll()])
    assert [row.verdict for row in report.rows] == ["yes", "yes", "no"]
    assert report["ReverseUnroll"].operation == "torch.compile"
    assert report["ReverseUnroll"].reason == "a compiled function has no second derivative"
    assert report["ReverseUnroll"].where.startswith("audits.py:")


def test_errors_of_this_package_are_told_in_two_columns() -> None:
    nonfinite = nonfinite_error("loss", float("nan"), "Lower it.").with_note("(Hypergradient strategy: `X`.)")
    assert explained(nonfinite) == ("the loss is nan", "Lower it.")
    both = report([combination_error("A", "b", "Use C"), combination_error("D", "e", "Use C")])
    assert explained(both) == ("A: b; D: e", "Use C.")
    assert explained(ValueError("No full stop")) == ("No full stop", "")


def test_an_error_that_comes_once_only_is_still_told() -> None:
    try:
        raise RuntimeError("derivative for aten::_fancy_backward is not implemented")
    except RuntimeError as error:
        found = diagnose(error, lambda: None)
    assert (found.operation, found.where) == ("fancy", "")
