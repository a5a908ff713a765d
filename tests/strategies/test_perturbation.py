"""ZerothOrder and PZOBO: differences of plain loops, their bias in μ, runs that repeat, black boxes."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import (
    PZOBO,
    Episode,
    FirstOrder,
    ForwardGradient,
    HypergradientStrategy,
    ReverseUnroll,
    ZerothOrder,
    hypergradient,
    tree,
)
from lightning_bilevel.directions import Gaussian
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.problem import Carry, InnerState
from lightning_bilevel.randomness import RngState
from lightning_bilevel.strategies.perturbation import PerturbedRuns
from lightning_bilevel.tree import Params
from tests.support.differences import (
    CENTRAL,
    EVERY,
    FORWARD,
    Make,
    UnitPerTensor,
    along,
    both_ways,
    every_kind,
    inner_products,
    plain_gradients,
)
from tests.support.precisions import Cleaning, by_hand
from tests.support.problems import Mlp, NoisyMlp, Quadratic, RidgeBlackBox, RidgeSolver, assert_close, episodes, train
from tests.support.seeds import call_of, forked, key_of
from tests.support.statistics import check_mean

# --- Bias ---


def check_order(make: Make, order: int) -> None:
    """The error against exact derivatives along the same directions falls as μ^order."""
    module, (episode,) = Mlp("momentum", shared=True), episodes(1)
    exact = hypergradient(module, ForwardGradient(4, Gaussian()), episode, seed=1).grads
    if make is PZOBO:  # its explicit part is taken as a whole, not along the directions
        _, _, c = plain_gradients(module, episode)
        v = Gaussian().draw(key_of(seed=1), 0, 4, c)
        exact = tree.add(exact, tree.sub(c, along(inner_products(c, v), v)))
    errors = [
        tree.norm(tree.sub(hypergradient(module, make(4, mu), episode, seed=1).grads, exact)).item()
        for mu in (1e-2, 5e-3, 2.5e-3)
    ]
    for large, small in zip(errors, errors[1:], strict=False):
        assert math.log2(large / small) == pytest.approx(order, abs=0.1), "order"


ORDERS = {"forward": 1, "central": 2, "PZOBO": 1}


@pytest.mark.parametrize("name", EVERY)
def test_bias_falls_with_mu(name: str) -> None:
    check_order(EVERY[name], ORDERS[name])


def test_the_order_check_tells_forward_from_central_differences() -> None:
    with pytest.raises(AssertionError, match="^order"):
        check_order(FORWARD, 2)
    with pytest.raises(AssertionError, match="^order"):
        check_order(CENTRAL, 1)


def check_unbiased(make: Make, mu: float) -> None:
    """The mean of 30 estimates of 64 directions each is within 4 standard errors of ∇h, coordinate by coordinate."""
    module, count = Quadratic(inner_steps=2, shared=True), 30
    episode = module.episode()
    exact = tree.flatten(module.solution(episode).grads)
    strategy = make(64, mu)
    samples = torch.stack(
        [tree.flatten(hypergradient(module, strategy, episode, seed=seed).grads) for seed in range(count)]
    )
    check_mean(samples, exact)


@every_kind
def test_unbiased_at_small_mu(make: Make) -> None:
    check_unbiased(make, 1e-4)


@every_kind
def test_the_unbiasedness_check_rejects_normalized_directions(make: Make) -> None:
    with pytest.raises(AssertionError, match="^the mean is off by"):
        check_unbiased(lambda *args: make(*args, directions=UnitPerTensor()), 1e-4)


# --- Perturbed runs repeat the base run ---


class Noisy(NoisyMlp):
    """With momentum, masks in both losses, and buffers that the outer loss reads."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__("momentum", shared, inner_start="warm")

    def outer_loss(self, batch):
        return super().outer_loss(batch) + self.net[1].running_mean.square().sum()

    def warm(self, episode: Episode) -> InnerState:
        """Return what one run leaves behind: moved θ and buffers, momentum that is not zero."""
        start = InnerState(tree.detach(self.inner_named()), {name: b.clone() for name, b in self.named_buffers()})
        functional = self.functional()
        with functional.session(), forked(0):
            problem, phi = functional.problem, functional.phi()
            state = ReverseUnroll().estimate(problem, Carry(start), phi, episode, call_of()).state
        assert all(value.abs().max() > 0 for value in state.opt_state["momentum"].values())
        assert state.buffers["net.1.running_mean"].abs().max() > 0
        return state


class Repeated(NamedTuple):
    """A warm module in the middle of an estimate."""

    functional: FunctionalModule
    episode: Episode
    warm: InnerState
    runs: PerturbedRuns

    @classmethod
    def of(cls, shared: bool, chunk_size: int | None) -> Repeated:
        module, (episode,) = Noisy(shared), episodes(1)
        warm, functional = module.warm(episode), module.functional()
        with functional.session(), forked(1):
            runs = PerturbedRuns(functional.problem, warm, functional.phi(), episode, chunk_size)
        return cls(functional, episode, warm, runs)

    def at(self, mu: float, count: int = 1) -> tuple[Params, Tensor]:
        """Return θ_T and h, stacked, at φ + μu."""
        with self.functional.session():
            directions = Gaussian().draw(key_of(), 0, count, self.runs.phi)
            return self.runs.solutions(directions, mu), self.runs.values(directions, mu)

    def value(self) -> Tensor:
        """Return h of the base run."""
        problem, phi = self.functional.problem, self.runs.phi
        with self.functional.session(), forked(1):
            state = PerturbedRuns(problem, self.warm, phi, self.episode, 1).base.state  # moves the generator on
            return problem.outer_loss(state.params, phi, self.episode.outer, state.buffers)


def tensors(state: InnerState) -> Params:
    return {name: value.clone() for name, value in (state.flat() | state.buffers).items()}


@both_ways
def test_without_a_perturbation_the_run_repeats_bit_for_bit(shared: bool) -> None:
    repeated = Repeated.of(shared, chunk_size=1)
    base, warm, value = tensors(repeated.runs.base.state), tensors(repeated.warm), repeated.value()
    for mu in (0.0, 1.0, 0.0):  # a run elsewhere in between leaves no trace
        theta, h = repeated.at(mu)
        assert set(theta) == set(repeated.runs.base.state.params)
        assert all(torch.equal(values[0], base[name]) for name, values in theta.items()) == (mu == 0)
        assert torch.equal(h[0], value) == (mu == 0)
    for before, state in ((base, repeated.runs.base.state), (warm, repeated.warm)):
        assert all(torch.equal(value, before[name]) for name, value in tensors(state).items())


def test_the_repetition_check_sees_masks_of_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    repeated = Repeated.of(shared=False, chunk_size=1)
    monkeypatch.setattr(RngState, "restore", lambda self: None)
    theta, _ = repeated.at(0.0)
    assert not torch.equal(theta["net.0.weight"][0], repeated.runs.base.state.params["net.0.weight"])


@both_ways
def test_vectorized_runs_repeat_the_base_run(shared: bool) -> None:
    repeated = Repeated.of(shared, chunk_size=None)
    theta, h = repeated.at(0.0, count=3)
    for i in range(3):
        assert_close(tree.index(theta, i), repeated.runs.base.state.params, 1e-12)
        torch.testing.assert_close(h[i], repeated.value(), rtol=1e-12, atol=0)


class Branching(Noisy):
    """Looks at a value in Python, which cannot be vectorized."""

    def inner_loss(self, batch: Any) -> Tensor:
        loss = super().inner_loss(batch)
        return loss if loss.item() > 0 else 2 * loss


@every_kind
def test_runs_that_cannot_be_vectorized_are_looped_with_a_warning(make: Make) -> None:
    module, (episode,) = Branching(False), episodes(1)
    carry, functional = Carry(module.warm(episode)), module.functional()

    def grads(strategy: HypergradientStrategy) -> Params:
        with functional.session(), forked(1):
            return strategy.estimate(functional.problem, carry, functional.phi(), episode, call_of()).grads

    looped = grads(make(4, 0.1, chunk_size=1))
    strategy = make(4, 0.1, chunk_size=None)
    with pytest.warns(UserWarning, match=r"cannot be vectorized over directions.*vmap.*Set `chunk_size=1`"):
        assert_close(grads(strategy), looped, 1e-15)
    assert_close(grads(strategy), looped, 1e-15)  # and without a warning


class Elsewhere(Cleaning):
    """The outer loss is computed in a dtype; of runs that are vectorized it is off by a factor."""

    def __init__(self, off: float, compute: torch.dtype) -> None:
        super().__init__()
        self.off, self.compute = off, compute

    def outer_loss(self, batch: Any) -> Tensor:
        loss = super().outer_loss(batch).to(self.compute).float()
        return (1 + self.off) * loss if torch._C._functorch.is_batchedtensor(loss) else loss


@pytest.mark.parametrize(
    ("compute", "cast"),
    [
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float16, None),
    ],
)
def test_vectorized_runs_may_be_apart_by_the_rounding_of_what_they_are_computed_in(
    compute: torch.dtype, cast: torch.dtype | None
) -> None:
    half = compute == torch.float16 or cast is not None
    for off, rounding in ((1e-5, True), (1e-2, half), (0.1, False)):
        looped = pytest.warns(UserWarning, match="cannot be vectorized over directions.*elsewhere than one by one, by")
        with torch.autocast("cpu", cast, enabled=cast is not None), nullcontext() if rounding else looped:
            by_hand(Elsewhere(off, compute), ZerothOrder(2, mu=1.0, chunk_size=2), torch.float32)


@both_ways
@every_kind
def test_chunks_change_nothing(make: Make, shared: bool) -> None:
    module, (episode,) = Noisy(shared), episodes(1)
    carry, functional = Carry(module.warm(episode)), module.functional()
    results = []
    for chunk_size in (1, 3, None):
        strategy = make(4, 0.1, chunk_size=chunk_size)
        with functional.session(), forked(1):
            results.append(strategy.estimate(functional.problem, carry, functional.phi(), episode, call_of()))
    for result in results[1:]:
        assert_close(result.grads, results[0].grads, 1e-10)
        assert torch.equal(result.value, results[0].value)


@both_ways
@pytest.mark.parametrize("chunk_size", [1, None])
@every_kind
def test_the_generator_is_left_where_a_plain_run_leaves_it(make: Make, chunk_size: int | None, shared: bool) -> None:
    class Dropout(Mlp):
        def __init__(self) -> None:
            super().__init__("SGD", shared)
            self.net.first.register_forward_hook(lambda module, inputs, output: nn.functional.dropout(output, 0.3))

    module, (episode,) = Dropout(), episodes(1)
    functional = module.functional()
    carry = Carry(InnerState({} if shared else functional.theta()))
    with forked(7):
        plain = train(module, episode)
        plain.outer_loss(episode.outer)
        expected = torch.get_rng_state()
    for strategy in (FirstOrder(), make(3, 0.01, chunk_size=chunk_size)):
        with forked(7), functional.session():
            result = strategy.estimate(functional.problem, carry, functional.phi(), episode, call_of())
            assert torch.equal(torch.get_rng_state(), expected)
        assert_close(result.state.params, tree.detach(plain.inner_named()), 1e-12)


# --- A user's own solver ---


@pytest.mark.parametrize("kind", [RidgeSolver, RidgeBlackBox])
@pytest.mark.parametrize(
    ("name", "mu", "rtol"), [("forward", 1e-6, 1e-4), ("central", 1e-4, 1e-6), ("PZOBO", 1e-6, 1e-4)]
)
def test_ridge_regression_by_a_solver(name: str, mu: float, rtol: float, kind: Any) -> None:
    module = kind()
    episode = module.episode()
    optimum = module.optimum(episode)
    v = Gaussian().draw(key_of(seed=4), 0, 5, optimum.grads)
    result = hypergradient(module, EVERY[name](5, mu), episode, seed=4)
    assert_close(result.grads, along(inner_products(optimum.grads, v), v), rtol)
    assert_close(result.state.params, {"weight": optimum.theta}, 1e-12)
    torch.testing.assert_close(result.value, optimum.value)


# --- Arguments ---


BAD = {
    "num_directions": ([0, -1, 1.5, True, None], "a positive integer"),
    "mu": ([0, -1e-3, math.inf, math.nan, True, "small"], "a positive number"),
    "chunk_size": ([0, 2.0, False], "a positive integer"),
}


@pytest.mark.parametrize("kind", [ZerothOrder, PZOBO])
@pytest.mark.parametrize("argument", BAD)
def test_bad_arguments(argument: str, kind: Any) -> None:
    values, expected = BAD[argument]
    for value in values:
        with pytest.raises(ValueError, match=rf"^Expected `{kind.__name__}\({argument}=\.\.\.\)` to be {expected}"):
            kind(**{argument: value})
