"""Which graph a step with some number takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import SGD, Adam, ReverseUnroll, TruncatedReverse, hypergradient
from lightning_bilevel.compiled import plan
from lightning_bilevel.compiled.plan import takes_number
from lightning_bilevel.inner_optimizers import InnerOptimizer, PerStep, RAdam
from tests.support.compiled import apart, both, episode, logged, needs_inductor, weighted


class Rule(InnerOptimizer):
    """Gradient descent with a rate that is a function of the number of the step."""

    def __init__(self, rate: Callable[[int], float]) -> None:
        self.rate = rate

    def update(self, params: Any, grads: Any, opt_state: Any, step: int) -> Any:
        return {name: value - self.rate(step) * grads[name] for name, value in params.items()}, {}


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "momentum": lambda module: SGD(lr=0.1, momentum=0.9, dampening=0.5),
    "Adam": lambda module: Adam(lr=0.1),
    "RAdam": lambda module: RAdam(lr=0.1),
    "rates of each step": lambda module: SGD(lr=PerStep([0.3, 0.2, 0.1]), momentum=0.9),
    "learned rates of each step": lambda module: SGD(lr=PerStep([module.log_lr.exp(), 0.2, 2 * module.log_lr.exp()])),
    "warm-up": lambda module: Rule(lambda step: 0.01 if step <= 2 else 0.1),
}


@pytest.fixture(params=["together", pytest.param("one by one", marks=pytest.mark.slow)])
def together(request: pytest.FixtureRequest) -> None:
    """Let steps share a graph, or not."""
    if request.param == "one by one":
        request.getfixturevalue("one_by_one")


SLOW = {"RAdam", "learned rates of each step"}


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(make, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, make in OPTIMIZERS.items()],
)
@pytest.mark.usefixtures("together")
def test_every_number_of_a_step_has_its_own_update(optimizer: Callable[[Any], Any], calls: list[int]) -> None:
    module = weighted(optimizer=optimizer, inner_steps=4)
    assert apart(*both(module)) < 2e-6
    assert calls


def test_what_an_update_reads_is_that_of_today_where_the_inner_level_goes_on(calls: list[int]) -> None:
    class Reading(InnerOptimizer):
        def __init__(self, module: Any) -> None:
            self.module = module

        def update(self, params: Any, grads: Any, opt_state: Any, step: int) -> Any:
            return {name: value - 0.1 * self.module.scale * grads[name] for name, value in params.items()}, {}

    module: Any = weighted(optimizer=Reading, inner_start="warm", inner_steps=2)
    module.scale, carries = torch.tensor(1.0), [None, None]
    for turn in range(3):
        found = []
        for which, module.compiles_steps in enumerate((True, False)):
            found.append(hypergradient(module, ReverseUnroll(), episode(turn), carry=carries[which]))
            carries[which] = found[-1].carry
        assert apart(*found) < 2e-6
        module.scale = 2 * module.scale
    assert calls


@pytest.mark.slow
def test_an_update_that_is_another_at_each_of_many_steps_is_eager() -> None:
    module = weighted(optimizer=lambda module: Rule(lambda step: 0.3 / step), inner_steps=10)
    with pytest.warns(UserWarning, match="the inner optimizer does something else at every step"):
        assert apart(*both(module)) < 2e-6


def test_only_rules_that_are_known_are_given_a_tensor_for_a_number() -> None:
    class Own(SGD):
        pass

    assert takes_number(SGD(lr=0.1, momentum=0.9))
    assert not takes_number(Own(lr=0.1))
    assert not takes_number(SGD(lr=PerStep([0.1, 0.2])))
    assert not takes_number(Rule(float))


def wide() -> nn.Module:
    """Return a net of more features than there are examples."""
    return nn.Sequential(nn.Linear(60, 30), nn.Tanh(), nn.Linear(30, 3))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take all steps for large ones, whose products are worth a thought."""
    monkeypatch.setattr(plan, "MOST_NUMBERS_OF_A_STEP", 0)
    monkeypatch.setattr("lightning_bilevel.compiled.factored.LEAST_OPERATIONS", 0)


def decay(module: Any, loss: Tensor) -> Tensor:
    return loss + 0.1 * sum(p.square().sum() for p in module.net.parameters())


SHARED: dict[str, tuple[Any, Callable[[Any, Tensor], Tensor], set[int]]] = {
    "reverse": (ReverseUnroll(), lambda module, loss: loss, {0, 3}),
    "decay": (ReverseUnroll(), decay, {0, 3}),
    "logged": (ReverseUnroll(), logged, {0, 3}),
    "checkpoints": (ReverseUnroll(checkpoint=3), decay, {0, 3}),
    "truncated": (TruncatedReverse(4), decay, {0, 2, 4}),
}


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("strategy", "term", "at"), SHARED.values(), ids=SHARED)
def test_large_steps_on_one_batch_share_a_graph(strategy: Any, term: Any, at: set[int], calls: list[int]) -> None:
    module = weighted(net=wide, term=term, inner_steps=6, optimizer=lambda module: SGD(lr=0.1))
    assert apart(*both(module, strategy, episode(features=(60,), batches=1))) < 2e-6
    assert set(calls) == at  # the steps before each graph


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("why", ["other batches", "more examples than features", "Adam"])
def test_large_steps_that_share_no_products_have_a_graph_each(why: str, calls: list[int]) -> None:
    batches, examples = (6, 6) if why == "other batches" else (1, 300 if why.startswith("more") else 6)
    make = Adam if why == "Adam" else SGD
    module = weighted(net=wide, inner_steps=6, optimizer=lambda module: make(lr=0.05))
    assert apart(*both(module, episodes=episode(features=(60,), examples=examples, batches=batches))) < 2e-6
    assert set(calls) == set(range(6))


@pytest.mark.slow
@needs_inductor
@pytest.mark.usefixtures("large", "by_inductor")
def test_large_steps_by_inductor(calls: list[int]) -> None:
    module = weighted(net=wide, term=decay, inner_steps=4)
    assert apart(*both(module, episodes=episode(features=(60,), batches=1))) < 2e-6
    assert set(calls) == {0, 2}
