"""How far θ_T is from where the implicit function theorem takes it to be, and the warning that it is elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import FSLA, SGD, Adam, AdamW, BilevelModule, Episode, ImplicitGradient, hypergradient
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.linear_solvers import Dense, Identity
from tests.support.modules import Calls, listed, trainer
from tests.support.problems import Mlp, Quadratic, draw, episodes

NONE = Episode([None], None)


class Toy(BilevelModule):
    """g = Σ a (θ − φ)²/2, a and φ per entry, and f = |θ − 3|²/2, with an inner optimizer of the test's choice."""

    def __init__(self, optimizer: Callable[[Toy], Any], size: int = 4, sign: float = 1.0, **options: Any) -> None:
        super().__init__(**{"inner_steps": 300, "inner_start": "reset", **options})
        self.theta = nn.Parameter(draw(size, seed=1))
        self.phi = nn.Parameter(torch.linspace(0.2, 1.0, size, dtype=torch.float64))
        self.curvature = torch.linspace(0.5, 1.5, size, dtype=torch.float64)
        self.optimizer, self.sign = optimizer, sign

    def inner_parameters(self):
        return [self.theta]

    def inner_loss(self, batch):
        return self.sign * 0.5 * (self.curvature * (self.theta - self.phi).square()).sum()

    def outer_loss(self, batch):
        return 0.5 * (self.theta - 3).square().sum()

    def configure_inner_optimizer(self):
        return self.optimizer(self)

    def configure_optimizers(self):
        return torch.optim.SGD([self.phi], lr=0.1)


class Projected(InnerOptimizer):
    """Descent, cut off above ½."""

    elementwise = False

    def update(self, params, grads, opt_state, step):
        return {name: (value - 0.3 * grads[name]).clamp_max(0.5) for name, value in params.items()}, {}


class Decaying(InnerOptimizer):
    """Descent with a decay that it does not speak of."""

    def update(self, params, grads, opt_state, step):
        return {name: 0.9 * value - 0.3 * grads[name] for name, value in params.items()}, {}


class Frank(Decaying):
    """The same, and says so."""

    stationary = True

    def penalty(self, params):
        return 0.5 / 3 * sum(value.square().sum() for value in params.values())


class Uphill(Decaying):
    """The same, upwards."""

    stationary = maximize = True

    def update(self, params, grads, opt_state, step):
        return super().update(params, {name: -grad for name, grad in grads.items()}, opt_state, step)

    penalty = Frank.penalty


def warned(module: BilevelModule, strategy: Any = None, episode: Episode = NONE) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        hypergradient(module, strategy or ImplicitGradient(Identity(0.1)), episode)
    return [str(warning.message) for warning in found]


ELSEWHERE = {
    "a projection": lambda module: Projected(),
    "a decay": lambda module: Decaying(),
}
THERE = {
    "SGD": lambda module: SGD(0.3),
    "SGD with decay": lambda module: SGD(0.3, weight_decay=0.5),
    "Adam with decay": lambda module: Adam(0.1, eps=1.0, weight_decay=0.5),
    "AdamW without": lambda module: AdamW(0.1, eps=1.0, weight_decay=0),
    "a decay that is stated": lambda module: Frank(),
}


@pytest.mark.parametrize("optimizer", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_fixed_point_of_another_map_is_warned_of(optimizer: Any) -> None:
    (message,) = warned(Toy(optimizer))
    assert message.startswith(
        "`ImplicitGradient` takes θ_T for a stationary point of the inner loss, but it is a fixed"
    )
    assert 'Use `ImplicitGradient(solver, form="fixed_point")`' in message


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 300, 3000])
@pytest.mark.parametrize("optimizer", THERE.values(), ids=THERE)
def test_a_stationary_point_and_the_way_there_are_not(optimizer: Any, steps: int, sign: float) -> None:
    def configure(module: Toy) -> InnerOptimizer:
        configured = optimizer(module)
        if sign < 0 and isinstance(configured, Frank):
            return Uphill()
        configured.maximize = sign < 0
        return configured

    assert not warned(Toy(configure, sign=sign, inner_steps=steps))


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_a_turning_point_of_momentum_is_not(momentum: float, size: int) -> None:
    """Somewhere on the way of every swing θ stands still, and the gradient is largest."""
    for steps in range(1, 60):
        assert not warned(Toy(lambda module: SGD(0.3, momentum=momentum), size, inner_steps=steps))


def test_it_is_said_once_and_looked_for_at_powers_of_two() -> None:
    updates = 0

    class Counted(Projected):
        def update(self, *args: Any) -> Any:
            nonlocal updates
            updates += 1
            return super().update(*args)

    module = Toy(lambda module: Counted())
    assert len(warned(module)) == 1
    assert not warned(module)
    module, looks = Toy(lambda module: SGD(0.1)), []
    original = SGD.update

    def update(self: SGD, *args: Any) -> Any:
        nonlocal updates
        updates += 1
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SGD, "update", update)
        for _ in range(9):
            updates = 0
            warned(module)
            looks.append(updates)
    more = looks[2]  # the run, and what is learned of the optimizer
    assert [look > more for look in looks] == [True, True, False, True, False, False, False, True, False]


def test_a_fit_that_is_long_on_its_way_is_told_in_the_end() -> None:
    module = Toy(lambda module: Decaying(), inner_start="warm", inner_steps=1)
    with pytest.warns(UserWarning, match=r"^`FSLA` takes θ_T for a stationary point"):
        trainer(FSLA(beta=0.1), max_steps=64, max_epochs=-1).fit(module, listed([NONE] * 64))


def test_looking_draws_nothing_and_changes_no_estimate() -> None:
    module, (episode,) = Mlp("Adam", learned=False), episodes(1)
    first = hypergradient(module, ImplicitGradient(Identity(0.1)), episode)
    for _ in range(2):  # the third does not look
        again = hypergradient(module, ImplicitGradient(Identity(0.1)), episode)
    assert torch.equal(first.grads["example_weights"], again.grads["example_weights"])


# --- The residual ---


@pytest.mark.parametrize("steps", [1, 5, 30, 400])
def test_the_residual_is_the_length_of_a_further_step(steps: int) -> None:
    module = Quadratic(steps)
    episode = module.episode()
    result = hypergradient(module, ImplicitGradient(Identity(0.1)), episode)
    theta = result.state.params["theta"]
    gradient = module.A @ theta - (module.B @ module.phi.detach() + episode.inner[0])
    expected = 0.1 * gradient.norm() / theta.norm()
    torch.testing.assert_close(result.metrics["inner_residual"], expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("steps", [5, 30])
def test_the_residual_bounds_how_far_the_outer_loss_is_off(steps: int) -> None:
    module = Toy(lambda module: SGD(0.05, weight_decay=0.4), inner_steps=steps)
    result = hypergradient(module, ImplicitGradient(Dense()), NONE)
    theta, best = result.state.params["theta"], module.curvature * module.phi.detach() / (module.curvature + 0.4)

    def off(there: Tensor) -> Tensor:
        return (theta - 3) @ (theta - there)

    bound = result.metrics["inner_residual"] * (theta - 3).norm() * theta.norm()
    assert 0 < off(best).abs() <= bound < 10


def test_the_residual_is_logged() -> None:
    seen = Calls(lambda module: module.trainer.callback_metrics["inner_residual"].item())
    module = Toy(lambda module: SGD(0.3, weight_decay=0.5), inner_steps=20, inner_start="warm")
    trainer(ImplicitGradient(Dense()), seen, max_steps=5, max_epochs=-1).fit(module, listed([NONE] * 5))
    assert len(seen.seen) == 5
    assert all(0 < value < 0.1 for value in seen.seen)


def test_the_residual_of_nothing_is_zero() -> None:
    class Constant(Toy):
        def outer_loss(self, batch):
            return 0 * self.theta.sum() + self.phi.sum()

    result = hypergradient(Constant(lambda module: SGD(0.1), inner_steps=1), ImplicitGradient(Identity()), NONE)
    assert result.metrics["inner_residual"] == 0
