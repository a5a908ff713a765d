"""The discovery of coefficients: both inner levels find one, and what is out of range is said."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import pde_discovery
from lightning_bilevel import Episode, ForwardGradient, ReverseUnroll, ZerothOrder, hypergradient
from lightning_bilevel.strategies.base import HypergradientStrategy
from pde import pinn
from pde.equations import EQUATIONS, observe
from pde.spectral import solve
from pde_discovery import Discovery, PINNDiscovery, SpectralDiscovery, draw_starts
from tests.support.modules import listed, trainer


def fit(module: Discovery, strategy: HypergradientStrategy, episode: Episode) -> None:
    trainer(strategy).fit(module, listed([episode] * module.hparams.steps))


def observed(name: str) -> torch.Tensor:
    return torch.tensor(observe(solve(name, EQUATIONS[name].nu)))


@pytest.mark.parametrize(("name", "start"), [("burgers", 0.006), ("allen-cahn", 0.002), ("kdv", 0.0035)])
def test_the_coefficient_is_found(name: str, start: float) -> None:
    module = SpectralDiscovery(name, start, steps=30)
    fit(module, ZerothOrder(num_directions=1, mu=1e-4), Episode([observed(name)], observed(name)))
    assert module.nu.item() == pytest.approx(EQUATIONS[name].nu, rel=1e-2)


def test_a_step_out_of_the_range_ends_at_its_edge() -> None:
    module = SpectralDiscovery("allen-cahn", 0.09, steps=1, outer_lr=20.0)
    with pytest.warns(UserWarning, match=r"^A step led to nu = .*, outside \[0\.0001, 0\.1\]; the edge is taken"):
        fit(module, ZerothOrder(mu=1e-4), Episode([torch.zeros(8, 8)], observed("allen-cahn")))
    assert module.nu.item() == pytest.approx(EQUATIONS["allen-cahn"].smallest)


def test_a_start_that_overflows_the_solver() -> None:
    module = SpectralDiscovery("burgers", 2e-4, steps=1)
    with pytest.raises(FloatingPointError, match=r"^Expected the solution of Burgers at nu = 0\.0002 to be finite"):
        fit(module, ZerothOrder(mu=1e-4), Episode([torch.zeros(8, 8)], observed("burgers")))


@pytest.mark.parametrize("start", [-0.01, 0.0, math.inf, math.nan])
def test_a_start_that_is_no_coefficient(start: float, tmp_path: Path) -> None:
    argv = ["--smoke", "--quiet", "--output", str(tmp_path), "--start", str(start)]
    with pytest.raises(ValueError, match=r"^Expected `Discovery\(start=...\)` to be a positive number, got"):
        pde_discovery.main(argv)


def test_starts_are_in_the_range_and_repeatable() -> None:
    for name, equation in EQUATIONS.items():
        starts = draw_starts(name, 200, seed=1)
        assert starts == draw_starts(name, 200, seed=1)
        assert equation.smallest <= min(starts) < max(starts) <= equation.largest_start
        assert np.mean(starts) == pytest.approx(equation.largest_start / 2, rel=0.15)


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_hypergradient_through_the_net(name: str) -> None:
    """One direction is enough for one coefficient: forward mode equals reverse mode."""
    torch.manual_seed(0)
    module = PINNDiscovery(name, 0.02, inner_steps=3).double()
    generator = torch.Generator().manual_seed(0)
    inner = [pinn.collocation(module.equation, 16, generator).double() for _ in range(3)]
    episode = Episode(inner, torch.ones(8, 8, dtype=torch.float64))
    forward = hypergradient(module, ForwardGradient(num_directions=1), episode).grads["log_nu"]
    reverse = hypergradient(module, ReverseUnroll(), episode).grads["log_nu"]
    assert forward.item() == pytest.approx(reverse.item(), rel=1e-8)
    assert forward.abs() > 1e-12


def test_the_net_knows_where_the_observations_are() -> None:
    module = PINNDiscovery("burgers", 0.02)
    t, x, initial = module.observed_at
    u = np.broadcast_to(np.arange(1, 257)[:, None] / 256, (256, 512))  # u = t
    assert t.tolist() == pytest.approx(observe(u).ravel().tolist())
    assert initial.tolist() == pytest.approx((-torch.sin(torch.pi * x)).tolist(), abs=1e-6)
    assert observe(module.solution()).ravel() == pytest.approx(
        pinn.field(module.net, t, x, initial).detach().numpy(), abs=1e-5
    )


@pytest.mark.parametrize("options", [("--inner", "pinn"), ("--equation", "all", "--starts", "1")])
def test_smoke_of_the_others(options: tuple[str, ...], tmp_path: Path) -> None:
    results = pde_discovery.main(["--smoke", "--quiet", "--output", str(tmp_path), *options])
    assert len(results["results"]) == (2 if "pinn" in options else 3)
    for row in results["results"]:
        assert math.isfinite(row["loss"])
        assert row["error of nu"] > 0
    assert list(tmp_path.glob("*.png"))
