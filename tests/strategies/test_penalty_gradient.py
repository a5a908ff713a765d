"""PenaltyGradient against closed forms in NumPy, in the limit against implicit and exact ones, and its pitfalls."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_bilevel import (
    SGD,
    Adam,
    AdamW,
    Episode,
    ForwardGradient,
    HypergradientSchedule,
    ImplicitGradient,
    PenaltyGradient,
    ReverseUnroll,
    RMSprop,
    hypergradient,
    tree,
)
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Dense, Neumann
from tests.support.problems import Mlp, Problem, Quadratic, RidgeSolver, assert_close, draw, episodes
from tests.support.seeds import forked, masks


class Oracle:
    """g = ½ θᵀAθ − θᵀb with b = Bφ + c₀, f = ½‖Cθ − e‖² + ½ρ‖φ‖², all in NumPy."""

    def __init__(self, module: Quadratic, episode: Episode) -> None:
        names = {"A": module.hessian, "B": module.B, "C": module.C, "phi": module.phi, "theta": module.theta}
        values = {name: value.detach().numpy() for name, value in names.items()}
        self.A, self.B, self.C, self.phi, self.start = values.values()
        self.b, self.e = self.B @ self.phi + episode.inner[0].numpy(), episode.outer.numpy()
        self.c, self.S, self.lr = module.rho * self.phi, self.C.T @ self.C, module.lr

    def end(self, nu: float, steps: int) -> np.ndarray:
        """Return θ after so many steps on g + νf, from the start; the minimum for none."""
        hessian = self.A + nu * self.S
        minimum = np.linalg.solve(hessian, self.b + nu * self.C.T @ self.e)
        if not steps:
            return minimum
        power = np.linalg.matrix_power(np.eye(len(hessian)) - self.lr * hessian, steps)
        return minimum + power @ (self.start - minimum)

    def forward(self, penalty: float, steps: int = 0, steps_of_z: int | None = None) -> np.ndarray:
        z = self.end(0.0, steps if steps_of_z is None else steps_of_z)
        return self.c - penalty * self.B.T @ (self.end(1 / penalty, steps) - z)

    def central(self, penalty: float, steps: int = 0) -> np.ndarray:
        return self.c - penalty / 2 * self.B.T @ (self.end(1 / penalty, steps) - self.end(-1 / penalty, steps))

    def exact(self) -> np.ndarray:
        d = self.C.T @ (self.C @ self.end(0.0, 0) - self.e)
        return self.c + self.B.T @ np.linalg.solve(self.A, d)


def estimated(strategy: PenaltyGradient, steps: int, lr: float = 0.1) -> tuple[np.ndarray, Oracle]:
    module = Quadratic(inner_steps=steps, lr=lr)
    result = hypergradient(module, strategy, module.episode())
    oracle = Oracle(module, module.episode())
    np.testing.assert_allclose(result.state.params["theta"], oracle.end(0.0, steps), rtol=1e-12)
    residual = oracle.C @ oracle.end(0.0, steps) - oracle.e
    np.testing.assert_allclose(result.value, 0.5 * residual @ residual + 0.5 * oracle.c @ oracle.phi, rtol=1e-12)
    return result.grads["phi"].numpy(), oracle


# --- Closed forms ---


@pytest.mark.parametrize("steps", [1, 5, 40])
@pytest.mark.parametrize("penalty", [1.0, 10.0, 1000.0])
def test_a_run_of_a_few_steps_is_its_closed_form(penalty: float, steps: int) -> None:
    forward, oracle = estimated(PenaltyGradient(penalty), steps)
    np.testing.assert_allclose(forward, oracle.forward(penalty, steps), rtol=1e-9)
    central, _ = estimated(PenaltyGradient(penalty, "central"), steps)
    np.testing.assert_allclose(central, oracle.central(penalty, steps), rtol=1e-9)


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_at_the_minima_it_is_off_by_one_over_the_penalty_or_its_square(scheme: Any) -> None:
    off = []
    for penalty in (100.0, 1000.0):
        found, oracle = estimated(PenaltyGradient(penalty, scheme), steps=200, lr=0.4)
        solved, nu = oracle.c, 1 / penalty
        d = oracle.C.T @ (oracle.C @ oracle.end(0.0, 0) - oracle.e)
        signs = (1,) if scheme == "forward" else (1, -1)
        for sign in signs:  # c + Bᵀ(A + νS)⁻¹ d*, without a difference
            solved = solved + oracle.B.T @ np.linalg.solve(oracle.A + sign * nu * oracle.S, d) / len(signs)
        np.testing.assert_allclose(found, solved, rtol=1e-7)
        off.append(np.linalg.norm(found - oracle.exact()))
    order = np.log10(off[0] / off[1])
    assert order == pytest.approx(1 if scheme == "forward" else 2, abs=0.1)


@pytest.mark.parametrize("steps", [1, 4])
def test_from_the_minimum_it_is_a_neumann_series(steps: int) -> None:
    module = Quadratic(inner_steps=steps, lr=0.1)
    episode = module.episode()
    with torch.no_grad():
        module.theta.copy_(module.optimum(episode).theta)
    found = hypergradient(module, PenaltyGradient(1e5), episode).grads
    series = hypergradient(module, ImplicitGradient(Neumann(steps, step_size=0.1)), episode).grads
    assert_close(found, series, 1e-4)


def test_unequal_runs_estimate_their_difference_in_training() -> None:
    """The trap: λ times the progress of the longer run, in the wrong direction. Here both runs are equally long."""
    module = Quadratic(inner_steps=5, lr=0.1)
    oracle = Oracle(module, module.episode())

    def cosine(found: np.ndarray) -> float:
        exact = oracle.exact()
        return float(found @ exact / np.linalg.norm(found) / np.linalg.norm(exact))

    trapped = oracle.forward(100.0, steps=5, steps_of_z=1)
    found, _ = estimated(PenaltyGradient(100.0), steps=5)
    assert np.linalg.norm(trapped) > 10 * np.linalg.norm(oracle.exact())
    assert cosine(trapped) < -0.9
    assert cosine(found) > 0.7


# --- What it sees ---


class Other(Quadratic):
    """The quadratic with another inner optimizer."""

    def __init__(self, optimizer: Any, steps: int = 250, sign: float = 1.0) -> None:
        super().__init__(inner_steps=steps)
        self.optimizer, self.sign = optimizer, sign

    def inner_loss(self, batch):
        return self.sign * super().inner_loss(batch)

    def configure_inner_optimizer(self):
        return self.optimizer(self)


class Clamped(SGD):
    """Gradient descent in the box |θ_i| ≤ 0.9."""

    def update(self, params, grads, opt_state, step):
        params, opt_state = super().update(params, grads, opt_state, step)
        return {name: value.clamp(-0.9, 0.9) for name, value in params.items()}, opt_state


OPTIMIZERS: dict[str, tuple[Any, float]] = {
    "momentum": (lambda module: SGD(0.2, momentum=0.7), 1.0),
    "weight decay": (lambda module: SGD(0.2, weight_decay=0.5), 1.0),
    "learned decay": (lambda module: SGD(0.2, weight_decay=module.phi.square().sum()), 1.0),
    "ascent": (lambda module: SGD(0.2, maximize=True), -1.0),
    "ascent with decay": (lambda module: SGD(0.2, maximize=True, weight_decay=0.5), -1.0),
    "projection": (lambda module: Clamped(0.2), 1.0),
    "Adam": (lambda module: Adam(0.2, eps=1.0), 1.0),
    "Adam with decay": (lambda module: Adam(0.2, eps=1.0, weight_decay=0.5), 1.0),
    "RMSprop": (lambda module: RMSprop(0.3, eps=1.0), 1.0),
    "torch": (lambda module: torch.optim.SGD([module.theta], lr=0.2, weight_decay=0.5), 1.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_long_runs_of_any_optimizer_approach_the_exact_gradient(name: str) -> None:
    optimizer, sign = OPTIMIZERS[name]
    module = Other(optimizer, sign=sign)
    exact = hypergradient(module, ReverseUnroll(), module.episode()).grads
    assert_close(hypergradient(module, PenaltyGradient(1e4, "central"), module.episode()).grads, exact, 2e-3)


class Weighted(Problem):
    """A weight for every example of two inner batches, and masks in both losses."""

    def __init__(self, dropout: float = 0.0, explicit: bool = False) -> None:
        super().__init__(inner_steps=3, inner_start="reset")
        self.theta, self.weights = nn.Parameter(draw(3, seed=1)), nn.Parameter(draw(8, seed=2))
        self.dropout, self.explicit = dropout, explicit

    def outer_parameters(self):
        return [self.weights]

    def inner_loss(self, batch):
        x, index = batch
        errors = (F.dropout(x, self.dropout) @ self.theta - 1).square()
        return (errors * self.weights[index].sigmoid()).mean()

    def outer_loss(self, batch):
        x = F.dropout(batch, self.dropout)
        return self.weights.square().sum() if self.explicit else (x @ self.theta - 2).square().mean()

    def configure_inner_optimizer(self):
        return SGD(lr=0.1)

    def episode(self) -> Episode:
        first, second = (draw(4, 3, seed=seed) for seed in (3, 4))
        return Episode([(first, torch.arange(4)), (second, torch.arange(4, 8))], draw(5, 3, seed=5))


def by_loops(module: Weighted, episode: Episode, penalty: float, seed: int = 0) -> torch.Tensor:
    """Return the estimate by plain loops; each begins with the same masks."""

    def run(nu: float) -> None:
        module.theta.data = start.clone()
        with forked(masks(seed)):
            for step in range(module.inner_steps):
                loss = module.inner_loss(episode.inner[step % 2])
                with torch.random.fork_rng(devices=[]):
                    loss = loss + nu * module.outer_loss(episode.outer)
                (slope,) = torch.autograd.grad(loss, [module.theta])
                module.theta.data -= 0.1 * slope

    def by_weights() -> torch.Tensor:
        with forked(masks(seed)):  # batches 1, 2, 1 of the three steps
            first, second = (module.inner_loss(batch) for batch in episode.inner)
            return torch.autograd.grad((2 * first + second) / 3, [module.weights])[0]

    start = module.theta.data.clone()
    run(0.0)
    of_z = by_weights()
    run(1 / penalty)
    of_y = by_weights()
    module.theta.data = start
    c = 2 * module.weights.detach() if module.explicit else 0.0
    return c + penalty * (of_y - of_z)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_batch_of_the_run_counts_as_often_as_it_was_used(dropout: float) -> None:
    module = Weighted(dropout)
    found = hypergradient(module, PenaltyGradient(50.0), module.episode(), seed=3).grads["weights"]
    torch.testing.assert_close(found, by_loops(module, module.episode(), 50.0, seed=3), rtol=1e-8, atol=1e-10)
    assert (found != 0).all() or dropout


def test_both_runs_draw_the_same_masks() -> None:
    """Where f does not move θ they are one run, also if f draws; other masks would count λ times."""
    module = Weighted(0.5, explicit=True)
    for scheme in ("forward", "central"):
        found = hypergradient(module, PenaltyGradient(1e6, scheme), module.episode()).grads["weights"]
        assert torch.equal(found, 2 * module.weights.detach())


# --- What it cannot see ---


def test_shared_parameters_need_a_proximal_term() -> None:
    module = Quadratic(shared=True)
    message = "^Cannot use `PenaltyGradient` with parameters shared by both levels and `proximal=0`"
    with pytest.raises(MisconfigurationError, match=message):
        hypergradient(module, PenaltyGradient(), module.episode())
    tied = Quadratic(inner_steps=200, lr=0.4, shared=True, proximal=0.4)
    exact = tied.optimum(tied.episode()).grads
    assert_close(hypergradient(tied, PenaltyGradient(1e4, "central"), tied.episode()).grads, exact, 1e-5)


def test_learned_rates_and_solvers_are_refused() -> None:
    with pytest.raises(MisconfigurationError, match="^Cannot use `PenaltyGradient` with an inner optimizer that dep"):
        hypergradient(Mlp("SGD"), PenaltyGradient(), episodes(1))
    with pytest.raises(MisconfigurationError, match="^Cannot use `PenaltyGradient` with an inner optimizer that dep"):
        hypergradient(Mlp("AdamW"), PenaltyGradient(), episodes(1))  # its decay is in no loss
    module = RidgeSolver()
    with pytest.raises(MisconfigurationError, match="^Cannot use `PenaltyGradient` with `solve_inner`"):
        hypergradient(module, PenaltyGradient(), module.episode())


def test_decoupled_decay_hardly_moves_the_minimum() -> None:
    """AdamW stays where the gradient is of the size of ``eps``, so that there ĝ is that of g alone."""
    module = Other(lambda module: AdamW(0.03, weight_decay=0.01), steps=400)
    exact = module.optimum(module.episode()).grads
    assert_close(hypergradient(module, PenaltyGradient(1e3, "central"), module.episode()).grads, exact, 0.05)


# --- Rounding ---


def told(module: Problem, strategy: PenaltyGradient, episode: Episode) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hypergradient(module, strategy, episode)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("dtype", "penalty", "tells"),
    [
        (torch.float64, 1e6, False),
        (torch.float32, 1e3, False),
        (torch.float32, 1e7, True),
        (torch.bfloat16, 1e3, True),
    ],
    ids=str,
)
def test_it_tells_where_rounding_takes_over(dtype: torch.dtype, penalty: float, tells: bool) -> None:
    module = Quadratic(inner_steps=30, lr=0.1).to(dtype)
    for name in ("A", "B", "C"):
        setattr(module, name, getattr(module, name).to(dtype))
    (inner,), outer = module.episode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            hypergradient(module, PenaltyGradient(penalty), Episode([inner.to(dtype)], outer.to(dtype)))
    messages = {str(each.message) for each in caught}
    assert bool(messages) == tells
    for message in messages:
        assert message.startswith(f"`PenaltyGradient(penalty={penalty})` is large for {dtype}: what it takes diff")


# --- In company ---


def test_it_guides_forward_gradients_and_takes_its_turn() -> None:
    module, (episode,) = Mlp("SGD", learned=False, inner_steps=4), episodes(1)
    exact = hypergradient(module, ReverseUnroll(), episode).grads

    def off(strategy: Any) -> float:
        found = [hypergradient(module, strategy, episode, seed=seed).grads for seed in range(8)]
        return sum(float(tree.norm(tree.sub(each, exact))) for each in found)

    assert off(ForwardGradient(3, guide=PenaltyGradient(1e3))) < 0.5 * off(ForwardGradient(3))
    schedule = HypergradientSchedule([(PenaltyGradient(1e3), 1), (ImplicitGradient(Dense()), None)])
    first = hypergradient(module, schedule, episode)
    assert_close(first.grads, hypergradient(module, PenaltyGradient(1e3), episode).grads, 1e-9)
