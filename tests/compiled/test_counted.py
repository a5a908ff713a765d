"""What metrics count by a graph is compared with what they count in eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_bilevel.compiled.counted import counted_alike, same
from lightning_bilevel.compiled.left import Left
from lightning_bilevel.compiled.reasons import NotCompiled
from tests.compiled.test_evaluation import At


def compared(wrong: Any = lambda results: results, term: Any = lambda module, loss: loss) -> None:
    at = At()
    module: Any = at.module
    module.mean = nn.ModuleList([MeanMetric()])
    at.module.outer_loss = lambda batch: term(module, module.net(batch[0]).square().sum())  # type: ignore[method-assign]
    functions = at.functions
    with at.functional.session():
        at.functional.recorder.begin()
        part = at.made("outer_slopes")
        counted_alike(
            lambda args: functions.outer_slopes(args, 0),
            lambda args: wrong(part(args)),
            functions,
            at.functional,
            at.args,
            torch.float32,
        )
    assert not functions.counts


def told(module: Any, loss: Tensor) -> Tensor:
    module.log("mean", module.mean[0](loss.detach()))
    return loss


def only_in_eager(module: Any, loss: Tensor) -> Tensor:
    if isinstance(module.mean[0](loss.detach()), Tensor):
        module.log("more", 1.0)
    return loss


def failing(module: Any, loss: Tensor) -> Tensor:
    module.mean[0].update(loss.detach(), loss=1)
    return loss


def test_metrics_that_get_the_same_count_alike() -> None:
    compared(term=told)
    compared(lambda results: [])  # no metric is called: nothing to compare


@pytest.mark.parametrize("term", [told, only_in_eager])
def test_metrics_that_get_something_else_do_not(term: Any) -> None:
    def wrong(results: list[Tensor]) -> list[Tensor]:
        return [results[0], results[1] + (term is told), *results[2:]]

    with pytest.raises(NotCompiled, match="compiled, its metrics count something else than they do"):
        compared(wrong, term)


def test_a_metric_that_fails_is_told_with_its_reason() -> None:
    with pytest.raises(NotCompiled, match="unexpected keyword argument 'loss'"):
        compared(term=failing)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.ones(2), torch.ones(2) + 1e-3),
        (torch.ones(2), torch.ones(1, 2)),
        (torch.ones(2), torch.ones(2).double()),
        (torch.ones(1), 1.0),
        ([1], [1, 2]),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 2}),
        ("a", "b"),
        (None, 0),
    ],
    ids=str,
)
def test_what_is_not_the_same(a: Any, b: Any) -> None:
    assert not same(a, b, 1e-6)
    assert same(a, a, 1e-6)
    assert not same([{"x": a}], [{"x": b}], 1e-6)


def test_objects_of_one_type_are_the_same() -> None:
    assert same(Left(), Left(), 0.0)
    assert same([torch.nan * torch.ones(1), object()], [torch.nan * torch.ones(1), object()], 0.0)
