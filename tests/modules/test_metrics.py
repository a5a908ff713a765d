"""Metrics in losses: they are differentiated as they are written, and count once per training step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bilevel import (
    PZOBO,
    SGD,
    BilevelModule,
    Episode,
    ForwardGradient,
    ForwardUnroll,
    ImplicitGradient,
    ReverseUnroll,
    ZerothOrder,
    hypergradient,
)
from lightning_bilevel.linear_solvers import Dense
from lightning_bilevel.modules.metrics import Later, RecordedMetrics, Unusable, usable
from tests.support.modules import listed, trainer

generator = torch.Generator().manual_seed(0)
INNER, OUTER = (
    [
        (
            torch.randn(6, 3, generator=generator, dtype=torch.float64),
            torch.randn(6, 1, generator=generator, dtype=torch.float64),
        )
        for _ in range(3)
    ]
    for _ in range(2)
)
EPISODES = [Episode([batch], query) for batch, query in zip(INNER, OUTER, strict=True)]


class Regression(BilevelModule):
    """A net whose body is outer and whose head is inner; ``term`` is the loss, with what it keeps on the module."""

    def __init__(self, term: Callable[..., Tensor], **kept: Any) -> None:
        super().__init__(inner_steps=2, inner_start="reset")
        generator = torch.Generator().manual_seed(1)
        self.body, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        self.term = term
        for name, value in kept.items():
            setattr(self, name, value)

    def inner_parameters(self) -> Any:
        return self.head

    def inner_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return self.term(self, self.head(self.body(x).tanh()), y)

    outer_loss = inner_loss

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.body.parameters(), lr=0.1)


class Whole(torchmetrics.Metric):
    """A criterion of the user's, with the default of updating twice."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, out: Tensor, y: Tensor) -> None:
        self.values.append((out - y).square().flatten())

    def compute(self) -> Tensor:
        return torch.cat(self.values).mean()


class Composite(torchmetrics.Metric):
    """Calls metrics that are in a plain list."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.parts = [squared(), torchmetrics.MeanAbsoluteError().set_dtype(torch.float64)]

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return sum(part(out, y) for part in self.parts)

    def update(self, out: Tensor, y: Tensor) -> None:
        for part in self.parts:
            part.update(out, y)

    def compute(self) -> Tensor:
        return sum(part.compute() for part in self.parts)


def squared() -> Any:
    return torchmetrics.MeanSquaredError().set_dtype(torch.float64)


def mse(out: Tensor, y: Tensor) -> Tensor:
    """Return what ``F.mse_loss`` does, which has no forward mode over reverse mode."""
    return (out - y).square().mean()


def used(metric: Any) -> Any:
    """Return a metric that has counted something before."""
    metric.update(torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64))
    return metric


def updated(module: Any, out: Tensor, y: Tensor) -> Tensor:
    module.m.update(out, y)
    return mse(out, y) * (1 + module.m.compute())


def updated_by_hand(module: Any, out: Tensor, y: Tensor) -> Tensor:
    total = (out - y).square().sum() + 2.0  # what it had counted before: 1, twice
    return mse(out, y) * (1 + (total / (len(out) + 2)).detach())


def collected(module: Any, out: Tensor, y: Tensor) -> Tensor:
    found = module.m(out, y)
    return found["MeanSquaredError"] + found["MeanAbsoluteError"]


def both(module: Any, out: Tensor, y: Tensor) -> Tensor:
    return mse(out, y) + F.l1_loss(out, y)


def twice(module: Any, out: Tensor, y: Tensor) -> Tensor:
    return module.m(out, y) + module.m(2 * out, y)


def recomputed(module: Any, out: Tensor, y: Tensor) -> Tensor:
    return checkpoint(module.m, out, y, use_reentrant=False)


def collection() -> Any:
    return torchmetrics.MetricCollection([squared(), torchmetrics.MeanAbsoluteError().set_dtype(torch.float64)])


def same(module: Any, out: Tensor, y: Tensor) -> Tensor:
    return mse(out, y)


def called(module: Any, out: Tensor, y: Tensor) -> Tensor:
    return module.m(out, y)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], Any], Callable[..., Tensor]]] = {
    "called": (called, squared, same),
    "called, having counted": (called, lambda: used(squared()), same),
    "a criterion of the user's": (called, Whole, same),
    "in a list": (called, Composite, both),
    "in a submodule": (lambda module, out, y: module.m[0](out, y), lambda: nn.ModuleList([squared()]), same),
    "a collection": (collected, collection, both),
    "one term": (lambda module, out, y: module.m(out, y) + F.l1_loss(out, y), squared, both),
    "twice": (twice, squared, lambda module, out, y: mse(out, y) + mse(2 * out, y)),
    "updated and computed": (updated, lambda: used(squared()), updated_by_hand),
}
STRATEGIES: dict[str, Callable[[], Any]] = {
    "reverse": ReverseUnroll,
    "recomputed": lambda: ReverseUnroll(checkpoint=1),
    "forward": lambda: ForwardUnroll(mode="forward"),
    "double backward": ForwardUnroll,
    "guess": lambda: ForwardGradient(num_directions=2, mode="forward"),
    "implicit": lambda: ImplicitGradient(Dense()),
    "PZOBO": lambda: PZOBO(num_directions=2, mu=0.1),
    "zeroth order": lambda: ZerothOrder(num_directions=2, mu=0.1),
}


FEW = ("reverse", "forward", "PZOBO")
PAIRS = [(case, strategy) for case in CASES for strategy in STRATEGIES if case == "called" or strategy in FEW]


@pytest.mark.parametrize("episodes", [1, 3, "looped"])
@pytest.mark.parametrize(("case", "strategy"), PAIRS)
def test_a_metric_is_differentiated_as_it_is_written(case, strategy, episodes):
    (term, build, by_hand), strategy = CASES[case], STRATEGIES[strategy]
    module, plain = Regression(term, m=build()), Regression(by_hand)
    given = EPISODES[: 1 if episodes == 1 else 3]
    for each in (module, plain):
        each.episode_chunk_size = 1 if episodes == "looped" else None
    before = copy.deepcopy([vars(each) for each in module.modules() if isinstance(each, torchmetrics.Metric)])
    found, right = (hypergradient(each, strategy(), given) for each in (module, plain))
    torch.testing.assert_close(found.value, right.value)
    torch.testing.assert_close(found.grads, right.grads)
    after = [vars(each) for each in module.modules() if isinstance(each, torchmetrics.Metric)]
    for old, new in zip(before, after, strict=True):
        assert set(old) == set(new)
        for name in ("sum_squared_error", "total", "values", "_update_count", "_computed", "_forward_cache"):
            if name in old:
                torch.testing.assert_close(new[name], old[name])
    copy.deepcopy(module)


class Logged(Regression):
    """Logs metrics of all sorts, and uses none of their values."""

    def __init__(self) -> None:
        super().__init__(logged)
        self.error, self.seen, self.mean = squared(), torchmetrics.MeanMetric(), torchmetrics.MeanMetric()
        self.all, self.right = collection(), torchmetrics.classification.BinaryAccuracy()
        self.kept: list[Any] = []


def logged(module: Any, out: Tensor, y: Tensor) -> Tensor:
    loss = mse(out, y)
    module.error(out, y)
    module.kept.append(module.seen(loss.detach()))
    module.mean.update(loss)
    module.log("right", module.right(out, (y > 0).int()))
    module.log_dict(module.all(out, y))
    module.log("mean", module.mean.compute())
    return loss


COUNTING = {
    "reverse": ReverseUnroll(),
    "forward": ForwardGradient(num_directions=2, mode="forward"),
    "PZOBO": PZOBO(num_directions=2, mu=0.1),
    "recomputed": ReverseUnroll(checkpoint=1),
}


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("strategy", COUNTING.values(), ids=COUNTING)
def test_metrics_that_are_only_logged_count_once_a_step(strategy, chunk):
    module = Logged()
    module.episode_chunk_size = chunk
    fit = trainer(strategy, max_epochs=1)
    fit.fit(module, listed([EPISODES, EPISODES]))
    assert (module.error.total, module.all["MeanAbsoluteError"].total) == (36, 36)  # 2 steps of 3 episodes of 6
    assert module.seen.weight == module.mean.weight == 6
    assert module.right.tp + module.right.tn + module.right.fp + module.right.fn == 36
    assert len(module.kept) == 2
    logs = fit.callback_metrics
    for name in ("right", "mean", "MeanSquaredError"):
        assert torch.isfinite(logs[name])
    torch.testing.assert_close(logs["MeanSquaredError"].double(), logs["outer_loss"].double())
    assert not any(value.requires_grad for value in (module.error.sum_squared_error, *module.kept))
    copy.deepcopy(module)


def test_a_value_that_vmap_cannot_compute_is_looped_over():
    """Its weight is the accuracy of each episode, not that of all."""

    def weighted(module: Any, out: Tensor, y: Tensor) -> Tensor:
        return mse(out, y) * (1 + module.m(out, (y > 0).int()))

    def by_hand(module: Any, out: Tensor, y: Tensor) -> Tensor:
        return mse(out, y) * (1 + ((out.sigmoid() > 0.5) == (y > 0)).double().mean())

    module = Regression(weighted, m=torchmetrics.classification.BinaryAccuracy())
    with pytest.warns(UserWarning, match=r"^The losses cannot be vectorized over episodes"):
        found = hypergradient(module, ReverseUnroll(), EPISODES)
    right = hypergradient(Regression(by_hand), ReverseUnroll(), EPISODES)
    torch.testing.assert_close(found.value, right.value)
    torch.testing.assert_close(found.grads, right.grads)


def test_a_checkpointed_metric_counts_once():
    module = Regression(recomputed, m=squared())
    trainer(ReverseUnroll(), max_epochs=1).fit(module, listed([EPISODES[:1]] * 2))
    assert module.m.total == 12


def test_an_unusable_value_can_be_logged_only():
    value = Unusable.of(torch.tensor(2.0), RuntimeError("No."))
    assert type(usable(value)) is Tensor
    assert usable(3) == 3
    for use in (lambda: value + 1, lambda: 1 - value, lambda: value.ndim, lambda: bool(value), value.item):
        with pytest.raises(RuntimeError, match=r"^No\.$"):
            use()


def test_what_is_called_in_the_place_of_a_metric():
    module = Regression(mse, m=squared(), all=torchmetrics.MetricCollection({"a": squared()}), listed=[squared()])
    metrics, seen = RecordedMetrics(module), []
    assert metrics.which == tuple(map(id, (module.m, module.all["a"], module.listed[0], module.all)))
    out = torch.ones(2, 1, dtype=torch.float64)
    with metrics.recording():
        metrics.begin()
        with metrics.replaced(lambda metric, name: lambda *args: seen.append((metric, name, args))):
            module.m(out, out)
            module.all.update(out, 0 * out)
            module.listed[0].compute()
            assert list(module.all.items()) == [("a", module.all["a"])]
            assert isinstance(module.m.total, Later)
            assert isinstance(module.m._update_count, Later)
            assert hash(module.m)
            with pytest.raises(AttributeError, match="'Later' object has no attribute 'sum'"):
                module.m.total.sum()
        assert metrics.latest == metrics._start
        assert module.m.total == 0
        assert module.all._state_is_copy is False
    assert [(metric, name) for metric, name, _ in seen] == [
        (module.m, "forward"), (module.all, "update"), (module.listed[0], "compute")
    ]  # fmt: skip


def test_what_a_metric_will_say_cannot_be_used():
    later = Later(3)
    assert later.number == 3
    assert {later: 1}[later] == 1
    for use in (bool, str, lambda each: each == 1, lambda each: each != 1, "{}".format):
        with pytest.raises(TypeError, match="a 'Later' cannot be used"):
            use(later)
    for use in (float, lambda each: each + 1, list, torch.as_tensor):
        with pytest.raises((TypeError, RuntimeError)):
            use(later)
