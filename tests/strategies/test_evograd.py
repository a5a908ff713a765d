"""EvoGrad against its formula with the directions given, and its mean against a single term of the Neumann series."""

from __future__ import annotations

import pytest
import torch

from lightning_bilevel import EvoGrad, ImplicitGradient, hypergradient, tree
from lightning_bilevel.directions import Gaussian, Rademacher
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Identity
from lightning_bilevel.problem import Carry, InnerState
from tests.support.problems import Mlp, Quadratic, assert_close, episodes
from tests.support.seeds import key_of


@pytest.mark.parametrize("copies", [2, 5])
@pytest.mark.parametrize("sampler", [Rademacher(), Gaussian()], ids=["signs", "normal"])
def test_it_is_the_gradient_by_way_of_the_weights(sampler, copies: int) -> None:
    module, sigma, temperature = Quadratic(inner_steps=3), 0.3, 0.7
    episode = module.episode()
    result = hypergradient(module, EvoGrad(copies, sigma, temperature, sampler), episode, seed=4)
    phi, end = module.phi.detach().requires_grad_(), module.solution(episode).theta
    v = sampler.draw(key_of(4), 0, copies, {"theta": end})["theta"]
    population = end + sigma * v
    b = module.B @ phi + episode.inner[0]
    losses = 0.5 * ((population @ module.A) * population).sum(1) - population @ b
    theta = (-losses / temperature).softmax(0) @ population
    value = 0.5 * (module.C @ theta - episode.outer).square().sum() + 0.5 * module.rho * phi.square().sum()
    assert_close(result.grads, {"phi": torch.autograd.grad(value, phi)[0]}, 1e-10)
    assert_close(result.state.params, {"theta": end}, 1e-12)


@pytest.mark.parametrize("copies", [2, 6])
def test_its_mean_is_one_term_of_the_series(copies: int) -> None:
    """400 draws, in standard errors."""
    module, sigma, temperature = Quadratic(inner_steps=3), 1e-3, 0.05
    functional, episode = module.functional(), module.episode()
    at = {"phi": functional.phi(), "carry": Carry(InnerState(functional.theta()))}
    strategy = EvoGrad(copies, sigma, temperature)
    found = torch.stack(
        [hypergradient(functional.problem, strategy, episode, seed=seed, **at).grads["phi"] for seed in range(400)]
    )
    scale = (copies - 1) * sigma**2 / (copies * temperature)
    expected = hypergradient(module, ImplicitGradient(Identity(scale)), episode).grads["phi"]
    explicit = module.rho * module.phi.detach()
    off = (found.mean(0) - expected) / (found.std(0) / 20)
    assert off.abs().max() < 4
    assert tree.norm({"phi": (found.mean(0) - explicit) / (found.std(0) / 20)}) > 5  # c alone would not do


def test_shared_parameters_are_refused() -> None:
    module = Quadratic(shared=True)
    with pytest.raises(MisconfigurationError, match="^Cannot use `EvoGrad` with parameters shared by both levels"):
        hypergradient(module, EvoGrad(), module.episode())
    with pytest.raises(MisconfigurationError, match="^Cannot use `EvoGrad` with an inner optimizer that depends"):
        hypergradient(Mlp("SGD"), EvoGrad(), episodes(1))
