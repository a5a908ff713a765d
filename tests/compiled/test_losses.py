"""The losses outside of steps: what changes between two estimates is seen, or they are eager."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_bilevel import (
    SGD,
    Episode,
    EvoGrad,
    FirstOrder,
    ForwardGradient,
    ForwardUnroll,
    GammaGreedy,
    HypergradientStrategy,
    ImplicitGradient,
    PenaltyGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
    hypergradient,
)
from lightning_bilevel.compiled import evaluation
from lightning_bilevel.linear_solvers import Neumann
from tests.support.compiled import CLASSES, FEATURES, Weighted, apart, both, episode, needs_inductor, weighted
from tests.support.modules import Maml
from tests.support.problems import RidgeBlackBox

pytestmark = pytest.mark.usefixtures("one_by_one")


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each call of a graph of the losses."""
    seen: list[int] = []
    original = evaluation.Evaluation.__call__

    def counted(self: evaluation.Evaluation, args: list[Tensor]) -> object:
        seen.append(len(args))
        return original(self, args)

    monkeypatch.setattr(evaluation.Evaluation, "__call__", counted)
    return seen


class Judging(Weighted):
    """Has something in its outer loss."""

    judge: Callable[[Any, Tensor], Any] = staticmethod(lambda self, loss: loss)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.number, self.listed, self.array, self.tensor = 1.0, [1.0], np.ones(2), torch.tensor(1.0)
        self.register_buffer("buffer", torch.ones(2))
        self.metric = MeanMetric()

    def outer_loss(self, batch: Any) -> Any:
        penalty = 0.1 * self.logits.square().sum()
        return self.judge(self, super().outer_loss(batch) + penalty)


def judging(judge: Any, **options: Any) -> Judging:
    torch.manual_seed(0)
    module = Judging(**options)
    module.judge = judge
    return module


class Case(NamedTuple):
    """Something in an outer loss, what changes it, and why it stays eager, if it does."""

    judge: Callable[[Any, Tensor], Any]
    change: Callable[[Any], Any] = lambda module: None  # noqa: E731
    because: str = ""


def up(name: str) -> Callable[[Any], None]:
    return lambda module: setattr(module, name, getattr(module, name) + 1)


NUMBERS = "it takes numbers out of an array or a tensor"
CASES = {
    "nothing": Case(lambda m, loss: loss),
    "a mapping": Case(lambda m, loss: {"loss": 2 * loss}),
    "a float": Case(lambda m, loss: loss * m.number, up("number")),
    "a tensor, replaced": Case(lambda m, loss: loss * m.tensor, up("tensor")),
    "a tensor, in place": Case(lambda m, loss: loss * m.tensor, lambda m: m.tensor.add_(1)),
    "a buffer, in place": Case(lambda m, loss: loss * m.buffer.sum(), lambda m: m.buffer.add_(1)),
    "the mode": Case(lambda m, loss: loss if m.training else 2 * loss, lambda m: m.train(not m.training)),
    "a forward hook": Case(
        lambda m, loss: loss, lambda m: m.net.register_forward_hook(lambda module, inputs, output: 2 * output)
    ),
    "a random mask": Case(lambda m, loss: loss * (1 + torch.rand(()))),
    "a number in a tensor": Case(lambda m, loss: loss * float(m.tensor), up("tensor"), NUMBERS),
    "a number in an array": Case(lambda m, loss: loss * float(m.array[0]), lambda m: m.array.__iadd__(1), NUMBERS),
    "Python's random": Case(lambda m, loss: loss * random.random(), because="."),
    "a branch on data": Case(lambda m, loss: 2 * loss if loss > 0.5 else loss, because="Data-dependent"),
    "a counter": Case(lambda m, loss: (up("number")(m), loss)[1], because="it writes to an attribute"),
    "a metric": Case(lambda m, loss: (m.metric.update(loss.detach()), loss)[1]),
    "what a metric says": Case(lambda m, loss: loss * m.metric(loss.detach()), because="it computes with"),
    "what is returned beside": Case(lambda m, loss: {"loss": loss, "twice": 2 * loss}),
    "an object beside": Case(lambda m, loss: {"loss": loss, "net": m.net}, because="it returns beside"),
}


FAST = {
    "nothing", "a float", "a tensor, in place", "the mode", "a random mask", "a number in a tensor", "a counter",
    "what is returned beside", "an object beside",
}  # fmt: skip
"""One of each kind; the others are slow together."""


def some(names: Iterable[str], fast: Collection[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some(CASES, FAST))
def test_what_changes_in_the_outer_loss_is_seen_or_it_is_eager(
    name: str, evaluated: list[int], calls: list[int]
) -> None:
    case = CASES[name]
    module = judging(case.judge)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert apart(*both(module)) < 2e-6
            case.change(module)
    said = [str(each.message) for each in caught if "compiled" in str(each.message)]
    if case.because:
        (message,) = said
        assert re.match(f"The outer losses are not compiled: {case.because}", message)
        assert not evaluated
    else:
        assert not said
        assert len(evaluated) >= 3
    assert len(calls) >= 9  # steps go on by graphs


CHANGES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], Any]]] = {
    "a float": (lambda m, loss: loss * m.number, up("number")),
    "a tensor": (lambda m, loss: loss * m.tensor, up("tensor")),
    "the mode": (lambda m, loss: loss if m.training else 2 * loss, lambda m: m.train(not m.training)),
    "the penalty": (lambda m, loss: loss, up("decay")),
}
STRATEGIES: dict[str, Callable[[], HypergradientStrategy]] = {
    "products": lambda: ImplicitGradient(Neumann(3, step_size=0.1)),
    "a fixed point": lambda: ImplicitGradient(Neumann(3, step_size=1.0), form="fixed_point"),
    "slopes": lambda: EvoGrad(2, sigma=0.1),
    "a loss of its own": lambda: PenaltyGradient(2.0),
}


@pytest.mark.parametrize("strategy", some(STRATEGIES, {"products", "a loss of its own"}))
@pytest.mark.parametrize("change", some(CHANGES, {"a tensor", "the penalty"}))
def test_what_changes_in_the_inner_level_is_seen(strategy: str, change: str, evaluated: list[int]) -> None:
    term, action = CHANGES[change]
    module: Any = weighted(term=term, optimizer=lambda module: SGD(lr=0.1, weight_decay=0.01 * module.decay))
    module.number, module.tensor, module.decay = 1.0, torch.tensor(1.0), 1.0
    module.log_lr.requires_grad_(False)
    for _ in range(3):
        assert apart(*both(module, STRATEGIES[strategy]())) < 2e-6
        action(module)
    assert evaluated


def test_batches_of_other_shapes(evaluated: list[int]) -> None:
    module = weighted()
    module.log_lr.requires_grad_(False)
    for count in (6, 3):
        for strategy in (STRATEGIES["products"](), STRATEGIES["a loss of its own"]()):
            assert apart(*both(module, strategy, episode(examples=count))) < 2e-6
    assert evaluated


@pytest.mark.parametrize("what", some(["products", "slopes", "a loss of its own"], {"products"}))
def test_what_the_inner_loss_cannot_do_leaves_all_of_it_eager_and_says_so_once(
    what: str, evaluated: list[int], calls: list[int]
) -> None:
    module: Any = weighted(term=lambda self, loss: loss * float(self.tensor))
    module.tensor = torch.tensor(2.0)
    module.log_lr.requires_grad_(False)
    with pytest.warns(UserWarning, match="The inner steps are not compiled: it takes numbers out of") as caught:
        assert apart(*both(module, STRATEGIES[what]())) < 2e-6
    assert len([each for each in caught if "compiled" in str(each.message)]) == 1
    assert not calls
    assert evaluated  # the outer loss


NET = {
    "dropout": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(), nn.Tanh(), nn.Linear(8, CLASSES)),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)),
}


@pytest.mark.parametrize("net", some(NET, {"dropout"}))
@pytest.mark.parametrize("strategy", some(STRATEGIES, {"products", "slopes"}))
def test_masks_and_buffers(net: str, strategy: str, evaluated: list[int]) -> None:
    module = weighted(net=NET[net], optimizer=lambda module: SGD(lr=0.1))
    module.log_lr.requires_grad_(False)
    for turn in range(2):
        assert apart(*both(module, STRATEGIES[strategy](), episode(turn))) < 2e-6
    assert evaluated


@pytest.mark.parametrize("strategy", [ReverseUnroll, STRATEGIES["products"], STRATEGIES["a loss of its own"]])
def test_stacked_episodes(strategy: Callable[[], HypergradientStrategy], evaluated: list[int]) -> None:
    torch.manual_seed(0)
    module = Maml(nn.Linear(FEATURES, CLASSES), F.cross_entropy, compile=True, episode_chunk_size=3, proximal=0.5)
    episodes = [Episode([each.inner[0][:2]], each.outer[:2]) for each in map(episode, range(3))]
    assert apart(*both(module, strategy(), episodes)) < 2e-6
    assert evaluated


def test_stacked_buffers_that_the_outer_loss_leaves(evaluated: list[int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    module = Maml(net, F.cross_entropy, compile=True, episode_chunk_size=3)
    episodes = [Episode([each.inner[0][:2]], each.outer[:2]) for each in map(episode, range(3))]
    ours, eager = both(module, FirstOrder(), episodes)
    assert apart(ours, eager) < 2e-6
    assert evaluated
    for name, value in eager.carry.inner.buffers.items():
        torch.testing.assert_close(ours.carry.inner.buffers[name], value)


class EveryStep(Judging):
    """Weighs its outer loss at every step, by weights that are learned."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.outlook = nn.Parameter(torch.tensor([0.5, -0.5, 1.0]))

    def outer_loss_weights(self) -> Tensor:
        return self.outlook.softmax(0)

    def outer_parameters(self) -> Any:
        return [self.logits, self.log_lr, self.outlook]


EVERY_STEP: dict[str, Callable[[], HypergradientStrategy]] = {
    "reverse": ReverseUnroll,
    "checkpointed": lambda: ReverseUnroll(checkpoint=2),
    "truncated": lambda: TruncatedReverse(2),
    "first order": FirstOrder,
    "greedy": lambda: GammaGreedy(0.9),
    "forward": ForwardUnroll,
    "forward mode": lambda: ForwardGradient(2, mode="forward"),
    "differences, one by one": lambda: ZerothOrder(2, chunk_size=1),
    "differences": lambda: ZerothOrder(4, chunk_size=4),
}


@pytest.mark.parametrize("strategy", some(EVERY_STEP, {"reverse", "truncated", "forward", "differences"}))
def test_the_outer_loss_at_every_step(strategy: str, evaluated: list[int], calls: list[int]) -> None:
    torch.manual_seed(0)
    module = EveryStep(net=NET["dropout"], optimizer=lambda module: SGD(lr=module.log_lr.exp(), momentum=0.5))
    module.judge = lambda m, loss: loss * m.number
    for turn in range(2):
        assert apart(*both(module, EVERY_STEP[strategy](), episode(turn))) < 2e-6
        module.number += 1
    assert len(evaluated) >= 6
    assert len(calls) >= 6


def test_the_outer_loss_at_every_step_of_a_stack(evaluated: list[int]) -> None:
    torch.manual_seed(0)
    module = EveryStep(net=NET["BatchNorm"], episode_chunk_size=2)
    episodes = [episode(0), episode(1)]
    for _ in range(2):
        ours, eager = both(module, ReverseUnroll(), episodes)
        assert apart(ours, eager) < 2e-6
        for name, value in eager.carry.inner.buffers.items():
            torch.testing.assert_close(ours.carry.inner.buffers[name], value)
        module.outlook.data += torch.tensor([1.0, 0.0, 0.0])
    assert evaluated


class Observing(ReverseUnroll):
    """Keeps what the losses logged."""

    def estimate(self, *args: Any) -> Any:
        result = super().estimate(*args)
        self.observed = result.observed
        return result


@pytest.mark.parametrize("kind", [Judging, EveryStep])
def test_what_the_outer_loss_logs_is_logged(kind: Any) -> None:
    def logged(self: Any, loss: Tensor) -> Tensor:
        self.log("outer/twice", 2 * loss, prog_bar=True)
        self.log_dict({"outer/number": self.number})
        return loss

    torch.manual_seed(0)
    module, ours, eager = kind(), Observing(), Observing()
    module.judge = logged
    hypergradient(module, ours, episode())
    module.compiles_steps = False
    hypergradient(module, eager, episode())
    found, expected = ours.observed.calls, eager.observed.calls
    assert found.keys() == expected.keys() == {"outer/twice", "outer/number"}
    torch.testing.assert_close(found["outer/twice"][0], expected["outer/twice"][0])
    assert found["outer/twice"][1:] == expected["outer/twice"][1:]
    assert found["outer/number"] == expected["outer/number"]
    assert ours.observed.beside == eager.observed.beside == {}


def test_a_batch_that_the_module_keeps_is_read_where_it_is_kept(evaluated: list[int]) -> None:
    class Keeping(Weighted):
        def outer_loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.net(self.kept[0]), batch[1]) + 0 * batch[0].sum()

    torch.manual_seed(0)
    module, given = Keeping(), episode()
    module.kept = list(given.outer)
    for _ in range(3):
        assert apart(*both(module, episodes=given)) < 2e-6
        module.kept[0] = 2 * module.kept[0]
    assert len(evaluated) >= 3


def test_a_solver_of_the_users(evaluated: list[int]) -> None:
    module = RidgeBlackBox()
    ours, eager = both(module, ImplicitGradient(Neumann(3, step_size=0.01)), module.episode())
    for name, value in eager.grads.items():
        torch.testing.assert_close(ours.grads[name], value)
    assert evaluated


def test_float64(evaluated: list[int]) -> None:
    module, given = weighted().double(), episode()
    module.log_lr.requires_grad_(False)
    batch = (given.inner[0][0].double(), *given.inner[0][1:])
    for make in STRATEGIES.values():
        assert apart(*both(module, make(), Episode([batch], batch))) < 1e-11
    assert evaluated


@pytest.mark.filterwarnings("ignore:The inner steps are not compiled. the strategy steps on another loss")
def test_a_loss_that_is_another_one_each_time_is_eager_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_bilevel.compiled import sight

    monkeypatch.setattr(sight, "MOST_LOSSES", 6)
    module = weighted(inner_steps=1)
    for number in range(3):
        assert apart(*both(module, PenaltyGradient(2.0 + number))) < 2e-6


@pytest.mark.slow
@needs_inductor
@pytest.mark.parametrize("name", [*STRATEGIES, "values"])
@pytest.mark.usefixtures("by_inductor")
@pytest.mark.filterwarnings("ignore:.Neumann.step_size=1.0.. diverges")
def test_inductor(name: str, evaluated: list[int]) -> None:
    module = weighted(net=NET["BatchNorm"])
    module.log_lr.requires_grad_(False)
    strategy = ZerothOrder(2, mu=0.1) if name == "values" else STRATEGIES[name]()
    assert apart(*both(module, strategy)) < 1e-5
    assert evaluated
