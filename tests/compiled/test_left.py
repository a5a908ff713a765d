"""Metrics in losses that are compiled: they count, and are logged, as they are without graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor, nn
from torchmetrics import MeanMetric, MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric

from lightning_bilevel import (
    DARTS,
    SGD,
    EvoGrad,
    FirstOrder,
    ForwardGradient,
    HypergradientStrategy,
    ImplicitGradient,
    PenaltyGradient,
    ReverseUnroll,
    ZerothOrder,
    bilevel,
)
from lightning_bilevel.compiled import left
from lightning_bilevel.compiled.beside import Beside
from lightning_bilevel.compiled.counted import same
from lightning_bilevel.compiled.left import Left, Logged, Taken, called, count_of, described, log_all, tensors_of
from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.linear_solvers import Neumann
from lightning_bilevel.modules.metrics import Later
from lightning_bilevel.modules.recorder import LogRecorder, Observed, primal
from tests.support.compiled import CLASSES, FEATURES, Weighted, apart, both, episode
from tests.support.modules import listed, trainer


class Kept(Metric):
    """Keeps what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("kept", [], dist_reduce_fx="cat")

    def update(self, values: dict[str, Tensor], factor: float = 1.0) -> None:
        self.kept.append(factor * values["of"].flatten())

    def compute(self) -> Tensor:
        return torch.cat(self.kept).mean()


Use = Callable[[Any, Tensor, Tensor], Any]


class Measured(Weighted):
    """Measures its outputs in the outer loss.

    Args:
        use: of the module, the outputs and the targets.
    """

    def __init__(self, use: Use, **options: Any) -> None:
        super().__init__(**{"episode_chunk_size": 1, **options})
        self.use, self.stage, self.factor = use, "training", 2.0
        self.accuracy, self.mean, self.error, self.kept = accuracy(), MeanMetric(), MeanSquaredError(), Kept()
        self.several = MetricCollection({"a": accuracy(), "f": MulticlassF1Score(CLASSES)}, prefix="all/")
        self.by_stage = nn.ModuleDict({f"{stage}_": accuracy() for stage in ("training", "test")})
        self.listed, self.plain = nn.ModuleList([accuracy(), MeanMetric()]), [accuracy()]
        self.classwise, self.extremes = ClasswiseWrapper(accuracy(average=None)), MinMaxMetric(accuracy())
        self.confusion = MulticlassConfusionMatrix(CLASSES)

    def outer_loss(self, batch: Any) -> Tensor:
        outputs = self.net(batch[0])
        self.use(self, outputs, batch[1])
        return F.cross_entropy(outputs, batch[1])


def accuracy(**options: Any) -> MulticlassAccuracy:
    return MulticlassAccuracy(CLASSES, **options)


def measured(use: Use, **options: Any) -> Measured:
    torch.manual_seed(0)
    module = Measured(use, **options)
    module.log_lr.requires_grad_(False)
    return module


USES: dict[str, Use] = {
    "a value": lambda m, x, y: m.log("a", m.accuracy(x, y), prog_bar=True),
    "a value by name": lambda m, x, y: m.log("a", m.accuracy(preds=x, target=y)),
    "an object": lambda m, x, y: (m.accuracy.update(x, y), m.log("a", m.accuracy)),
    "computed": lambda m, x, y: (m.accuracy.update(x, y), m.log("a", m.accuracy.compute())),
    "thrown away": lambda m, x, y: m.mean(x.max(), weight=m.factor),
    "twice": lambda m, x, y: (m.accuracy(2 * x, y), m.log("a", m.accuracy(x, y)), m.log("x", x.sum())),
    "reset": lambda m, x, y: (m.mean(x.sum()), m.mean.reset(), m.log("mean", m.mean(x.max()))),
    "squares": lambda m, x, y: m.log("e", m.error(x[:, 0], y.float())),
    "a collection": lambda m, x, y: m.log_dict(m.several(x, y)),
    "a collection of objects": lambda m, x, y: (m.several.update(x, y), m.log_dict(m.several)),
    "one by one": lambda m, x, y: [(each.update(x, y), m.log(name, each)) for name, each in m.several.items()],
    "a dict": lambda m, x, y: m.log("a", m.by_stage[f"{m.stage}_"](x, y)),
    "a list": lambda m, x, y: [m.log("a", m.listed[0](x, y)), m.listed[1].update(x.mean())],
    "a plain list": lambda m, x, y: m.log("a", m.plain[0](x, y)),
    "a dict of values": lambda m, x, y: m.log_dict(m.classwise(x, y)),
    "a wrapper": lambda m, x, y: m.log_dict(m.extremes(x, y)),
    "a matrix": lambda m, x, y: m.confusion(x, y),
    "tensors in a dict": lambda m, x, y: (m.kept.update({"of": x.exp()}, factor=m.factor), m.log("k", m.kept)),
}
FAST = {("a value", "run"), ("an object", "run"), ("a collection", "run"), ("a value", "products")}
STRATEGIES = {"run": ReverseUnroll, "end": FirstOrder, "copies": lambda: ZerothOrder(2)}


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Return a list of what each run has left to be logged and counted."""
    seen: list[Any] = []
    original = LogRecorder.end

    def end(self: LogRecorder, left: Any, count: int) -> Any:
        assert isinstance(left, Observed)
        seen.append((left.calls, left.metrics))
        return original(self, left, count)

    monkeypatch.setattr(LogRecorder, "end", end)
    return seen


def some(names: Iterable[str], fast: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def cases(strategies: Iterable[str]) -> list[Any]:
    """Return all uses with one strategy, and all strategies with one use; one of each is fast."""
    found = dict.fromkeys([*((use, "run") for use in USES), *(("a value", strategy) for strategy in strategies)])
    return [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id="-".join(case)) for case in found]


def change(module: Any) -> None:
    module.stage, module.factor, module.accuracy = "test", 3.0, accuracy(average="micro")


@pytest.mark.parametrize("chunk", [1, 3], ids=["looped", "stacked"])
@pytest.mark.parametrize(("use", "strategy"), cases(STRATEGIES))
def test_metrics_count_and_are_logged(
    use: str, chunk: int, strategy: str, observed: list[Any], recwarn: pytest.WarningsRecorder
) -> None:
    module, episodes = measured(USES[use], episode_chunk_size=chunk), [episode(seed) for seed in range(3)]
    for _ in range(3):
        assert apart(*both(module, STRATEGIES[strategy](), episodes)) < 2e-6
        ours, eager = observed[: len(observed) // 2], observed[len(observed) // 2 :]
        assert len(ours) == 3 // chunk
        assert same(ours, eager, 1e-6)
        assert [list(calls) for calls, _ in ours] == [list(calls) for calls, _ in eager]
        observed.clear()
        change(module)
    assert not [each for each in recwarn if "compiled" in str(each.message)]


REFUSED: dict[str, tuple[Use, str]] = {
    "arithmetic": (lambda m, x, y: m.log("a", 1 - m.accuracy(x, y)), "it computes with what a metric says"),
    "a number": (lambda m, x, y: m.log("a", m.accuracy(x, y).item()), "it computes with what a metric says"),
    "a branch": (lambda m, x, y: m.log("a", 1 if m.accuracy(x, y) else 2), "it computes with what a metric says"),
    "a comparison": (lambda m, x, y: m.log("a", m.accuracy(x, y) == 1), "it computes with what a metric says"),
    "a text": (lambda m, x, y: f"{m.accuracy(x, y)}", "it computes with what a metric says"),
    "a tensor of it": (lambda m, x, y: m.log("a", torch.stack([m.accuracy(x, y), x.sum()])), "."),
    "its state": (lambda m, x, y: (m.mean.update(x), m.log("a", m.mean.mean_value + 1)), "it computes with what"),
    "whether it was called": (lambda m, x, y: m.log("a", float(m.mean.update_called)), "."),
    "its type": (
        lambda m, x, y: m.log("a", 1.0) if isinstance(m.accuracy(x, y), Tensor) else None,
        "compiled, its metrics count something else than they do",
    ),
    "an array": (lambda m, x, y: m.mean(x.detach().numpy()), "."),
    "an object": (lambda m, x, y: m.mean(x, weight=m.optimizer), "."),
}


@pytest.mark.parametrize("name", some(REFUSED, {"arithmetic", "its state", "its type"}))
def test_what_is_not_followed(name: str, observed: list[Any], calls: list[int]) -> None:
    use, because = REFUSED[name]
    module = measured(use)
    if name == "an object":
        module.mean = Forgiving()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert apart(*both(module)) < 2e-6
    (said,) = [str(each.message) for each in caught if "compiled" in str(each.message)]
    assert said.startswith(f"The outer losses are not compiled: {'' if because == '.' else because}")
    assert same(*observed, 1e-6)
    assert calls


class Forgiving(MeanMetric):
    """Takes anything for a weight."""

    def update(self, value: Tensor, weight: Any = None) -> None:
        super().update(value)


def test_an_outer_loss_within_steps_that_calls_a_metric() -> None:
    module = measured(USES["a value"])
    with pytest.warns(UserWarning, match="The inner steps are not compiled: the strategy steps on an outer loss"):
        assert apart(*both(module, PenaltyGradient(2.0))) < 2e-6


@pytest.mark.parametrize("strategy", [ReverseUnroll, FirstOrder])
def test_a_graph_whose_metrics_get_something_else_is_not_used(
    strategy: Callable[[], HypergradientStrategy], monkeypatch: pytest.MonkeyPatch, observed: list[Any]
) -> None:
    original = left.called

    def wrong(calls: Any, tensors: Any, functional: Any) -> Any:
        return original(calls, [tensor + 1 for tensor in tensors], functional)

    monkeypatch.setattr(left, "called", wrong)
    module = measured(USES["thrown away"])
    with pytest.warns(UserWarning, match="The outer losses are not compiled: compiled, its metrics count something"):
        assert apart(*both(module, strategy())) < 2e-6
    assert same(*observed, 1e-6)


class MeasuredTwice(Measured):
    """Measures its outputs in the inner loss, too, or there alone."""

    judged = True

    def inner_loss(self, batch: Any) -> Tensor:
        x, y, index = batch
        outputs = self.net(x)
        self.use(self, outputs, y)
        return (self.logits[index].sigmoid() * F.cross_entropy(outputs, y, reduction="none")).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return super().outer_loss(batch) if self.judged else F.cross_entropy(self.net(batch[0]), batch[1])


INNER: dict[str, Callable[[], HypergradientStrategy]] = {
    "run": ReverseUnroll,
    "steps": lambda: ReverseUnroll(checkpoint=1),
    "tangents": lambda: ForwardGradient(2),
    "forward mode": lambda: ForwardGradient(2, mode="forward"),
    "products": lambda: ImplicitGradient(Neumann(3, step_size=0.1)),
    "slopes": lambda: EvoGrad(2, sigma=0.1),
    "copies": lambda: ZerothOrder(2),
    "rule": DARTS,
    "a loss of its own": lambda: PenaltyGradient(2.0),
}


@pytest.mark.parametrize("judged", [pytest.param(False, marks=pytest.mark.slow), True], ids=["inner", "both"])
@pytest.mark.parametrize("chunk", [1, 3], ids=["looped", "stacked"])
@pytest.mark.parametrize(("use", "strategy"), cases(INNER))
@pytest.mark.filterwarnings("ignore:The inner steps are not compiled. the strategy steps on an outer loss that calls")
@pytest.mark.filterwarnings("ignore:The inner steps are not compiled. attempted to apply meta conversion")
def test_metrics_of_the_inner_loss(
    strategy: str, use: str, chunk: int, judged: bool, observed: list[Any], calls: list[int]
) -> None:
    torch.manual_seed(0)
    module = MeasuredTwice(USES[use], episode_chunk_size=chunk, optimizer=lambda module: SGD(lr=0.1))
    module.judged = judged
    module.log_lr.requires_grad_(False)
    for turn in range(2):
        episodes = [episode(3 * turn + n) for n in range(3)]
        assert apart(*both(module, INNER[strategy](), episodes)) < 2e-6
        half = len(observed) // 2
        assert same(observed[:half], observed[half:], 2e-5)
        observed.clear()
    assert calls or strategy in ("forward mode", "a loss of its own")


class Fitted(Measured):
    """Logs all kinds of metrics, by value and as objects, for steps and epochs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(fit_use, **options)


def fit_use(m: Any, x: Tensor, y: Tensor) -> None:
    m.accuracy.update(x, y)
    m.log("objects", m.accuracy, on_step=True, on_epoch=True, batch_size=1)
    m.log("values", m.listed[0](x, y), on_step=True, on_epoch=True, batch_size=1)
    m.log_dict(m.several(x, y), on_step=False, on_epoch=True, batch_size=1)
    m.log("squares", m.error(x.softmax(-1)[:, 0], y.float()), batch_size=1)
    m.mean.update(x.max())


def logs_of(compiles: bool, chunk: int) -> list[Any]:
    """Return what a fit has logged after every step, and what its metrics have counted at the end."""
    torch.manual_seed(0)
    module, found = Fitted(compile=compiles, episode_chunk_size=chunk), list[Any]()
    module.on_train_batch_end = lambda *args: found.append(dict(fit.callback_metrics))  # type: ignore[method-assign]
    batches = [[episode(3 * step + n) for n in range(3)] for step in range(3)]
    fit = trainer(ReverseUnroll(), max_epochs=2)
    fit.fit(module, listed(batches))
    found.append(dict(fit.callback_metrics))
    return [*found, module.mean.compute(), module.mean.weight, module.error.total]


@pytest.mark.parametrize("chunk", [1, 3], ids=["looped", "stacked"])
def test_a_fit_logs_what_the_eager_one_does(chunk: int, calls: list[int]) -> None:
    ours = logs_of(compiles=True, chunk=chunk)
    assert calls
    eager = logs_of(compiles=False, chunk=chunk)
    assert same(ours, eager, 2e-5)
    assert {"objects", "objects_epoch", "values_step", "values_epoch", "all/a", "squares"} <= eager[-4].keys()
    assert eager[-2] == 18  # episodes


class Plain(LightningModule):
    """A classifier as it is, whose training step is both losses."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.accuracy = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES), accuracy()
        self.several = MetricCollection({"a": accuracy(), "f": MulticlassF1Score(CLASSES)})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = self.head(self.body(batch[0]).tanh())
        self.accuracy(outputs, batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True, batch_size=1)
        self.log_dict(self.several(outputs, batch[1]), on_step=False, on_epoch=True, batch_size=1)
        return {"loss": F.cross_entropy(outputs, batch[1]), "outputs": outputs}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_a_module_as_it_is_with_metrics(calls: list[int]) -> None:
    def fitted(compiles: bool) -> list[Any]:
        torch.manual_seed(0)
        options: Any = {"inner_steps": 2, "inner_start": "reset", "inner_optimizer": SGD(lr=0.1), "compile": compiles}
        found: list[Any] = []
        fit = trainer(
            ReverseUnroll(), LambdaCallback(on_train_batch_end=lambda *args: found.append(args[2])), max_epochs=2
        )
        batches = [[episode(3 * step + n) for n in range(3)] for step in range(2)]
        fit.fit(bilevel(Plain(), inner="head", outer="body", episode_chunk_size=3, **options), listed(batches))
        return [*found, dict(fit.callback_metrics)]

    ours = fitted(compiles=True)
    assert calls
    assert len(ours[0]["outputs"]) == 3
    assert same(ours, fitted(compiles=False), 2e-5)


def test_calls_are_taken_out_of_function_transforms() -> None:
    calls, mean = Taken(LogRecorder(), outer=True), MeanMetric()

    def loss(x: Tensor) -> Tensor:
        assert calls.instead(mean, "update")({"of": [x, "a"]}, weight=2.0).number == 0
        assert calls.instead(mean, "forward")(torch.ones(2)).number == 1
        return x.sum()

    torch.vmap(loss)(torch.arange(6.0).reshape(2, 3))
    first, second = calls.made
    assert (first.method, len(first.levels[0])) == ("update", 1)
    assert (second.method, second.levels[0]) == ("forward", [])
    assert [tuple(each.shape) for each in calls.tensors] == [(2, 3), (2,)]
    with pytest.raises(NotCompiled, match="it gives a metric something that is no tensor, number or text"):
        calls.instead(mean, "update")(object())


@pytest.mark.parametrize("sizes", [(), (2,), (2, 4)], ids=str)
def test_calls_are_made_with_other_tensors(sizes: tuple[int, ...]) -> None:
    module = measured(lambda *args: None)
    calls = Taken(LogRecorder(), outer=True)

    def loss(x: Tensor) -> Tensor:
        calls.instead(module.mean, "forward")(x.mT)
        return x

    for _ in sizes:
        loss = torch.vmap(loss)
    x = torch.arange(6.0 * torch.Size(sizes).numel()).reshape(*sizes, 2, 3)
    loss(0 * x)
    (tensor,), functional = calls.tensors, module.functional()
    with functional.session():
        functional.recorder.begin()
        with called(calls.made, [tensor + x.mT], functional) as (said,):
            torch.testing.assert_close(primal(said), x.mean())
        place = functional.recorder.metrics.index(id(module.mean))
        counted = functional.recorder.counted[place]
    torch.testing.assert_close(counted["mean_value"] / counted["weight"], x.mean())


def test_calls_of_the_last_evaluation_count() -> None:
    module = measured(lambda *args: None)
    recorder = LogRecorder()
    with recorder.recording(module):
        taken = Taken(recorder, outer=False)
        for number in range(2):
            with recorder.evaluation():
                said = taken.instead(module.mean, "forward")(number * torch.ones(1))
                with recorder.evaluation(counts=False):
                    repeated = taken.instead(module.mean, "forward")(5 * torch.ones(1))
            taken.log["mean"] = said, (), {}
        assert taken.left(Beside()).logged == [Logged("mean", said, (), {})]
        assert [float(each) for each in taken.tensors] == [1.0]
        taken.log["again"] = repeated, (), {}
        with pytest.raises(NotCompiled, match="what it logs of its metrics is another thing at every step"):
            taken.left(Beside())
        recorder.before_outer_loss()
        with pytest.raises(NotCompiled, match="the strategy steps on an outer loss that calls a metric"):
            taken.instead(module.mean, "update")(torch.ones(1))


def test_logs_are_told_with_what_metrics_said() -> None:
    log = {"a": (torch.ones(()), (), {}), "b": (Later(0), (), {"x": 1}), "c": (3, (), {})}
    logged = [*described(log), Logged(1, Later(1), (), {})]
    seen: list[Any] = []
    assert (count_of(logged), len(tensors_of(log))) == (1, 1)
    log_all(logged, [torch.zeros(())], lambda *args, **kwargs: seen.append((*args, kwargs)), [5, {"d": 6, "e": 7}])
    assert seen == [("a", torch.zeros(()), {}), ("b", 5, {"x": 1}), ("c", 3, {}), ("d", 6, {}), ("e", 7, {})]
    assert Left().size == 0
