"""One estimate without a Trainer: of a module as in a fit, step after step, and of a plain problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_bilevel import (
    FSLA,
    SGD,
    Episode,
    ForwardGradient,
    ForwardUnroll,
    HypergradientStrategy,
    ReverseUnroll,
    hypergradient,
    tree,
)
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.problem import BilevelProblem, Carry, InnerState
from tests.support.modules import Cleaning, differing, listed, loader, parameters, trainer
from tests.support.problems import Quadratic, assert_close
from tests.support.seeds import seeded


class Kept(Cleaning):
    """Keeps the gradients of the outer parameters, which stay as they are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(optimizer=lambda lr: SGD(lr=0.1, momentum=self.momentum), **options)
        self.momentum, self.grads = 0.9, []

    def outer_parameters(self) -> Any:
        return [self.example_weights]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.example_weights], lr=0.0)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.grads.append({"example_weights": self.example_weights.grad.clone()})


@pytest.mark.parametrize("make", [ReverseUnroll, FSLA], ids=lambda kind: kind.__name__)
def test_a_loop_over_carries_is_a_fit_bit_for_bit(make: Callable[[], HypergradientStrategy]) -> None:
    """θ, the optimizer's state, its count of steps, and what the strategy carries go on by value."""
    options = {"inner_steps": 1} if make is FSLA else {}
    fitted, module = (seeded(lambda: Kept(**options)) for _ in range(2))
    if make is FSLA:
        fitted.momentum = module.momentum = 0.0
    batches, before, carry = list(loader()), parameters(module), None
    trainer(make()).fit(fitted, listed(batches))
    grads, values = [], []
    for batch in batches:
        result = hypergradient(module, make(), batch, carry=carry)
        carry = result.carry
        grads.append(result.grads)
        values.append(result.value)
    assert len(grads) == len(fitted.grads) == 4
    assert all(differing(own, theirs) == [] for own, theirs in zip(grads, fitted.grads, strict=True))
    assert torch.equal(torch.stack(values), torch.stack(fitted.values))
    assert differing(carry.inner.params, {k: v for k, v in parameters(fitted).items() if k.startswith("net.")}) == []
    assert (carry.strategy != {}) == (make is FSLA)
    assert differing(before, parameters(module)) == []  # the module itself stays where it was


def test_what_starts_anew_does_not_go_on() -> None:
    module, episode = Cleaning(inner_start="reset"), next(iter(loader()))
    first = hypergradient(module, ReverseUnroll(), episode)
    again = hypergradient(module, ReverseUnroll(), episode, carry=first.carry)
    assert differing(first.grads, again.grads) == []
    assert again.state.steps == first.state.steps


def test_a_carry_is_a_value() -> None:
    """It stays as it is when an estimate goes on from it, so that the estimate can be repeated."""
    module, batches = Cleaning(), list(loader())
    carry = hypergradient(module, ReverseUnroll(), batches[0]).carry
    before = tree.map(torch.clone, carry.inner.flat())
    one, other = (hypergradient(module, ReverseUnroll(), batches[1], carry=carry) for _ in range(2))
    assert differing(one.grads, other.grads) == []
    assert differing(before, carry.inner.flat()) == []


# ---------------------------------------------------------------------------------------------------------------------
# A plain problem
# ---------------------------------------------------------------------------------------------------------------------


def by_hand(module: Quadratic) -> BilevelProblem:
    """Return the quadratic as functions that know nothing of a module."""

    def inner_loss(theta: Any, phi: Any, batch: Any, buffers: Any) -> Any:
        w = theta["w"]
        return 0.5 * w @ module.A @ w - w @ (module.B @ phi["p"] + batch), buffers

    def outer_loss(theta: Any, phi: Any, batch: Any, buffers: Any) -> Any:
        return 0.5 * (module.C @ theta["w"] - batch).square().sum() + 0.5 * module.rho * phi["p"].square().sum()

    def update(theta: Any, grads: Any, opt_state: Any, phi: Any, step: int) -> Any:
        return tree.add(theta, grads, alpha=-module.lr), opt_state

    return BilevelProblem(inner_loss, outer_loss, update, module.inner_steps)


EXACT = [ReverseUnroll(), ReverseUnroll(checkpoint=2), ForwardUnroll(), ForwardUnroll(mode="forward")]


@pytest.mark.parametrize("strategy", EXACT, ids=["reverse", "checkpointed", "forward", "forward mode"])
def test_functions_by_hand_give_the_closed_form(strategy: HypergradientStrategy) -> None:
    module, [episode, other] = Quadratic(), [Quadratic().episode(seed) for seed in (0, 1)]
    problem, phi = by_hand(module), {"p": module.phi.detach()}
    carry = Carry(InnerState({"w": module.theta.detach()}))
    expected = [module.solution(each) for each in (episode, other)]
    found = hypergradient(problem, strategy, episode, phi=phi, carry=carry)
    assert_close({"phi": found.grads["p"]}, expected[0].grads)
    torch.testing.assert_close(found.value, expected[0].value)
    torch.testing.assert_close(found.state.params["w"], expected[0].theta)
    several = hypergradient(problem, strategy, [episode, other], phi=phi, carry=carry)
    looped = hypergradient(replace(problem, max_copies=1), strategy, [episode, other], phi=phi, carry=carry)
    mean = tree.scale(tree.add(expected[0].grads, expected[1].grads), 0.5)
    for result in (several, looped):
        assert_close({"phi": result.grads["p"]}, mean)
        torch.testing.assert_close(result.value, (expected[0].value + expected[1].value) / 2)
        torch.testing.assert_close(result.state.params["w"], torch.stack([each.theta for each in expected]))


def test_a_plain_problem_goes_on_from_a_carry() -> None:
    """Two estimates of T steps, one after the other, end where one of 2T steps does."""
    module = Quadratic(inner_steps=3)
    problem, phi, episode = by_hand(module), {"p": module.phi.detach()}, module.episode()
    carry = Carry(InnerState({"w": module.theta.detach()}))
    for _ in range(2):
        carry = hypergradient(problem, ReverseUnroll(), episode, phi=phi, carry=carry).carry
    module.inner_steps = 6
    torch.testing.assert_close(carry.inner.params["w"], module.solution(episode).theta)
    assert carry.inner.steps == 6


def test_the_seed_decides_on_a_plain_problem_too() -> None:
    module = Quadratic()
    options = {"phi": {"p": module.phi.detach()}, "carry": Carry(InnerState({"w": module.theta.detach()}))}
    problem, state = by_hand(module), torch.get_rng_state()
    first, again, other = (
        hypergradient(problem, ForwardGradient(1), module.episode(), seed=seed, **options).grads["p"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_a_plain_problem_is_checked() -> None:
    module = Quadratic()
    problem, phi = by_hand(module), {"p": module.phi.detach()}
    carry = Carry(InnerState({"w": module.theta.detach()}))
    with pytest.raises(MisconfigurationError, match=r"^Cannot use `FSLA` with an inner level that starts anew\."):
        hypergradient(problem, FSLA(), module.episode(), phi=phi, carry=carry)
    spoilt = Episode([module.episode().inner[0] * float("nan")], module.episode().outer)
    message = r"^Expected the inner loss at step 1 of 5 .*\(Hypergradient strategy: `ReverseUnroll`\.\)$"
    with pytest.raises(FloatingPointError, match=message):
        hypergradient(problem, ReverseUnroll(), spoilt, phi=phi, carry=carry)
    with pytest.raises(ValueError, match=r"to be at least one episode, got \[\]"):
        hypergradient(problem, ReverseUnroll(), [], phi=phi, carry=carry)
