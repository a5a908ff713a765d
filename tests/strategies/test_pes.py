"""PES against its formula in NumPy, and its mean against the derivative of a whole run's smoothed loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_bilevel import PES, SGD, Adam, Episode, ForwardGradient, ZerothOrder, hypergradient
from lightning_bilevel.directions import Gaussian
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.problem import BilevelProblem, Carry, Hypergradient, InnerState, Traits
from lightning_bilevel.randomness import Call, Key
from lightning_bilevel.testing import Centred, Initialization, Quadratic
from tests.strategies.test_bome import ByHand, Warm
from tests.support.modules import trainer
from tests.support.problems import assert_close, draw
from tests.support.seeds import key_of

MU = 0.3


def drawn(pairs: int, seed: int) -> np.ndarray:
    like = {"phi": torch.zeros(3).double()}
    return Gaussian().draw(key_of(seed), 0, pairs, like)["phi"].numpy()


@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_it_is_the_formula(chunk_size: int | None) -> None:
    """With momentum, on the quadratic: states, and what they have been perturbed by, last; φ moves on the way."""
    module, strategy, pairs, carry = Warm(2, SGD(0.2, momentum=0.5)), PES(2, MU, chunk_size), 2, None
    by_hand = ByHand(module)
    theta, velocity, total = np.tile(module.theta.detach().numpy(), (2 * pairs, 1)), np.zeros((2 * pairs, 4)), 0.0
    for k in range(4):
        phi, v = module.phi.detach().numpy(), drawn(pairs, k)
        moved = phi + MU * np.concatenate([v, -v])
        for _ in range(2):
            velocity = 0.5 * velocity + theta @ by_hand.A - moved @ by_hand.B.T - by_hand.c0
            theta = theta - 0.2 * velocity
        residual = theta @ by_hand.C.T - by_hand.e
        h = 0.5 * (residual**2).sum(1) + 0.5 * by_hand.rho * (moved**2).sum(1)
        total = total + v
        expected = (h[:pairs] - h[pairs:]) @ total / (2 * pairs * MU)
        result = hypergradient(module, strategy, module.episode(), seed=k, carry=carry)
        np.testing.assert_allclose(result.grads["phi"], expected, rtol=1e-8)
        carry = result.carry
        with torch.no_grad():
            module.phi.sub_(0.05 * result.grads["phi"])


def test_its_first_step_is_an_antithetic_one() -> None:
    module = Centred("Adam", inner_start="warm")
    first = hypergradient(module, PES(3, 1e-3), module.episode(), seed=2)
    expected = hypergradient(module, ZerothOrder(3, 1e-3, "central", Gaussian()), module.episode(), seed=2)
    assert_close(first.grads, expected.grads, 1e-7)


P, Q, C = 0.8 * torch.eye(3).double() - 0.1 * draw(3, 3, seed=1), draw(3, 2, seed=2) / 2, draw(4, 3, seed=3)
"""θ ← Pθ + Qφ, and f = Σ_j cos ⟨C_j, θ⟩: a normal θ has the mean value Σ_j exp(−var/2) cos ⟨C_j, mean⟩."""
WAVES = BilevelProblem(
    inner_loss=lambda theta, phi, batch, buffers: ((theta["w"] * theta["w"]).sum(), buffers),
    outer_loss=lambda theta, phi, batch, buffers: (C @ theta["w"]).cos().sum(),
    update=lambda theta, grads, opt_state, phi, step: ({"w": P @ theta["w"] + Q @ phi["p"]}, opt_state),
    inner_steps=1,
    traits=Traits(warm=True),
)
PHI, START = {"p": draw(2, seed=4)}, {"w": draw(3, seed=5)}
STEPS, PAIRS, SEEDS = 4, 100, 40


def smoothed(mu: float) -> torch.Tensor:
    """Return the derivative of the whole run's value, with φ perturbed anew at every outer step."""
    powers = [torch.linalg.matrix_power(P, k) for k in range(STEPS)]
    response = sum(powers) @ Q
    mean = torch.linalg.matrix_power(P, STEPS) @ START["w"] + response @ PHI["p"]
    covariance = sum(power @ Q @ Q.T @ power.T for power in powers) * mu**2
    damped = torch.exp(-torch.einsum("ji,ik,jk->j", C, covariance, C) / 2)
    return -(damped * (C @ mean).sin()) @ C @ response


def estimates(then: Callable[[Carry], Carry] = lambda carry: carry) -> torch.Tensor:
    """Return estimates after so many outer steps at one φ."""
    found = []
    for seed in range(SEEDS):
        carry = Carry(InnerState(START))
        for step in range(STEPS):
            at: dict[str, Any] = {"phi": PHI, "carry": carry, "seed": 100 * seed + step}
            result = hypergradient(WAVES, PES(PAIRS, MU), Episode([None], None), **at)
            carry = then(result.carry)
        found.append(result.grads["p"])
    return torch.stack(found)


def forgetting(carry: Carry) -> Carry:
    """Drop what the states were perturbed by: truncated evolution strategies on states that last."""
    kept = carry.strategy
    return carry._replace(strategy={**kept, "sum": {"p": torch.zeros_like(kept["sum"]["p"])}})


def test_its_mean_is_the_derivative_of_the_whole_smoothed_run() -> None:
    expected, plain = smoothed(MU), smoothed(0.0)
    assert (expected - plain).norm() > 0.05 * plain.norm()  # so that the smoothing shows

    def off(samples: torch.Tensor) -> float:
        return float(((samples.mean(0) - expected) / (samples.std(0) / SEEDS**0.5)).abs().max())

    assert off(estimates()) < 4
    assert off(estimates(forgetting)) > 8
    assert off(estimates(lambda carry: Carry(carry.inner))) > 8  # truncated: every step from the present θ


def carried(result: Hypergradient) -> torch.Tensor:
    return torch.cat([result.kept["sum"]["target"].flatten(), result.kept["theta"]["theta"].flatten()])


def test_a_run_that_starts_anew_has_not_been_perturbed() -> None:
    module, strategy = Quadratic("momentum", inner_start="warm"), PES(2, MU)
    episode, fresh = module.episode(), Quadratic("momentum", inner_start="reset")
    after = hypergradient(module, strategy, episode, seed=1)
    module.inner_start = "reset"
    restarted = hypergradient(module, strategy, episode, seed=2, carry=after.carry)
    begun = hypergradient(fresh, strategy, episode, seed=2)
    assert torch.equal(carried(restarted), carried(begun))
    assert not any("slot" in name for name in restarted.kept)  # nor does the inner optimizer go on, as with θ


class Planned(Quadratic):
    """A new inner problem at every other batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.inner_start = "warm" if batch_idx % 2 else "reset"

    def configure_optimizers(self):
        return torch.optim.SGD(self.outer_parameters(), lr=0.0)


def test_runs_start_anew_in_a_fit() -> None:
    sums = []
    for batches in (1, 2, 3, 4):
        module = Planned("momentum", inner_start="reset")
        data = DataLoader([module.episode()] * batches, batch_size=None)
        torch.manual_seed(0)
        trainer(PES(1, MU)).fit(module, data)
        kept = module.fit_context.memory.strategy
        draws = [Gaussian().draw(Key((0, k, 0, 0)), 0, 1, module.functional().phi())["target"] for k in range(batches)]
        sums.append((kept["sum"]["target"], sum(draws[batches - (2 - batches % 2) :])))
    for found, expected in sums:
        torch.testing.assert_close(found, expected)


def test_processes_draw_alike() -> None:
    """What they carry is averaged, and the mean of other perturbations would be of another variance."""
    module = Quadratic(inner_start="warm")
    problem, phi, carry = module.plain()
    problem = replace(problem, traits=Traits(warm=True))
    calls = [Call(Key((0, 0, 0, rank)), together=Key((0, 0, 0, 0))) for rank in range(2)]
    for strategy, alike in ((PES(2), True), (ForwardGradient(2), False)):
        found = [strategy.estimate(problem, carry, phi, module.episode(), call).grads["target"] for call in calls]
        assert torch.equal(*found) == alike
    guided = [
        ForwardGradient(2, guide=PES(2)).estimate(problem, carry, phi, module.episode(), call).kept["guide/sum"]
        for call in calls
    ]
    assert torch.equal(guided[0]["target"], guided[1]["target"])


def test_the_state_of_the_optimizer_goes_on() -> None:
    """Here of Adam, whose rate is learned."""

    class Rated(Warm):
        def __init__(self) -> None:
            super().__init__(1)
            self.rate = torch.nn.Parameter(torch.tensor(0.01).double())

        def outer_parameters(self):
            return [self.rate]

        def configure_inner_optimizer(self):
            return Adam(self.rate)

    module = Rated()
    result = hypergradient(module, PES(4, 1e-4), module.episode())
    assert set(result.grads) == {"rate"}
    assert {"slot exp_avg", "slot exp_avg_sq"} <= set(result.kept)
    assert result.kept["theta"]["theta"].shape == (8, 4)


def test_what_it_cannot_go_on_with_is_refused() -> None:
    with pytest.raises(MisconfigurationError, match="^Cannot use `PES` with parameters shared by both levels"):
        hypergradient(Initialization(), PES(), Initialization().episode())
    module = Quadratic(inner_start="warm")
    carry = hypergradient(module, PES(2), module.episode()).carry
    with pytest.raises(MisconfigurationError, match=r"^Cannot use `PES\(num_directions=3\)`. This is bec.* 2 pairs"):
        hypergradient(module, PES(3), module.episode(), carry=carry)


def test_a_mu_below_rounding_is_warned_of() -> None:
    module = Quadratic(inner_start="warm").float()
    with pytest.warns(UserWarning, match=r"^`PES\(mu=1e-06\)` is small for torch.float32: differences of an out"):
        hypergradient(module, PES(mu=1e-6), module.episode())


def test_statistics_and_counters_of_batch_norm_go_on() -> None:
    torch.manual_seed(0)
    module = Warm(2)
    module.norm = torch.nn.BatchNorm1d(4, affine=False).double()
    plain = module.inner_loss
    module.inner_loss = lambda batch: plain(batch) + module.norm(module.theta + draw(8, 4, seed=3)).square().mean()
    carry = None
    for chunk_size in (None, 1, 3):
        result = hypergradient(module, PES(2, MU, chunk_size), module.episode(), carry=carry)
        carry = result.carry
    assert result.kept["buffers"]["norm.num_batches_tracked"].tolist() == [6] * 4
    assert result.kept["buffers"]["norm.running_mean"].std(0).min() > 0
