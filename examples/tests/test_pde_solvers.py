"""The spectral solvers are as accurate as they say, and the net's derivatives are right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pde import pinn
from pde.equations import EQUATIONS, POINTS, TIMES, grid, observe
from pde.spectral import SCHEMES, Modes, allen_cahn, coefficients, kdv, march, solve


def difference(u: np.ndarray, v: np.ndarray) -> float:
    return float(np.linalg.norm(u - v) / np.linalg.norm(v))


def cole_hopf(nu: float, t: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the exact solution of Burgers' equation from −sin πx.

    With u = −2ν φ_x/φ, φ solves the heat equation; both integrals over the heat kernel are by Gauss–Hermite.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(200)
    y = x[None, :, None] - np.sqrt(4 * nu * t)[:, None, None] * nodes
    exponent = -np.cos(np.pi * y) / (2 * np.pi * nu)
    density = weights * np.exp(exponent - exponent.max(-1, keepdims=True))
    return -(np.sin(np.pi * y) * density).sum(-1) / density.sum(-1)


@pytest.mark.parametrize(("nu", "tolerance"), [(0.01 / math.pi, 2e-6), (0.05, 1e-8), (1.0, 1e-7)])
def test_burgers_is_cole_hopf(nu: float, tolerance: float) -> None:
    t, x = grid()
    assert difference(solve("burgers", nu)[7::8, ::4], cole_hopf(nu, t[7::8], x[::4])) < tolerance


def test_kdv_moves_a_soliton() -> None:
    """u = 3 c sech²(√(c/ν) (x − c t) / 2), once around the domain."""
    nu, speed, n = 4e-4, 1.0, 512
    x = -1 + 2 * np.arange(n) / n
    soliton = 3 * speed / np.cosh(np.sqrt(speed / nu) * x / 2) ** 2
    modes = kdv(nu, soliton)
    u = modes.values(march(modes, steps=4800, every=2400, end=2.0))
    assert np.abs(u[1] - soliton).max() < 1e-4
    assert np.abs(u[0] - np.roll(soliton, n // 2)).max() < 1e-4


def test_kdv_conserves() -> None:
    """Mass, momentum and energy are what they are at t = 0: 0, 1 and −ν π² / 2."""
    equation = EQUATIONS["kdv"]
    u = solve("kdv", equation.nu)
    k = np.pi * np.arange(POINTS // 2 + 1)
    u_x = np.fft.irfft(1j * k * np.fft.rfft(u), POINTS)
    integral = lambda values: 2 * values.mean(-1)  # noqa: E731
    assert np.abs(integral(u)).max() < 1e-12
    assert np.abs(integral(u**2) - 1).max() < 1e-6
    assert np.abs(integral(u**3 / 6 - equation.nu * u_x**2 / 2) + equation.nu * np.pi**2 / 2).max() < 1e-5


def test_allen_cahn_keeps_its_ends_and_its_symmetry() -> None:
    u = solve("allen-cahn", EQUATIONS["allen-cahn"].nu)
    assert np.abs(u[:, 0] + 1).max() < 1e-12
    assert np.abs(u[:, 1:] - u[:, :0:-1]).max() < 1e-10
    assert np.abs(u).max() <= 1 + 1e-9  # the maximum principle


def test_allen_cahn_solves_a_manufactured_problem() -> None:
    """Fronts ± tanh(x / w) with w² = 2ν/5 stand still, and two of them far apart do so up to e^(−4/w)."""
    nu, n = 1e-3, 512
    x = -1 + 2 * np.arange(n) / n
    width = math.sqrt(2 * nu / 5)
    pair = np.tanh((x + 0.5) / width) - np.tanh((x - 0.5) / width) - 1
    modes = allen_cahn(nu, pair)
    u = modes.values(march(modes, steps=256, every=256))[0]
    assert np.abs(u - pair).max() < 1e-8


@pytest.mark.parametrize("name", EQUATIONS)
def test_finer_grids_change_nothing(name: str) -> None:
    scheme, nu = SCHEMES[name], EQUATIONS[name].nu
    u = solve(name, nu)
    assert u.shape == (TIMES, POINTS)
    assert difference(u, solve(name, nu, points=2 * scheme.points)) < 1e-7
    assert difference(u, solve(name, nu, steps=2 * scheme.steps)) < 1e-6


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_least_coefficient_is_resolved(name: str) -> None:
    """Well enough for the loss to be right: the steps of a discovery may end there."""
    scheme, nu = SCHEMES[name], EQUATIONS[name].smallest
    fine = solve(name, nu, points=4 * scheme.points, steps=4 * scheme.steps)
    assert np.abs(observe(solve(name, nu)) - observe(fine)).max() < 1e-2


def test_order_four() -> None:
    exact = solve("kdv", 0.0025, steps=8192)
    errors = [difference(solve("kdv", 0.0025, steps=steps), exact) for steps in (512, 1024)]
    assert 12 < errors[0] / errors[1] < 20


def test_the_coefficients_cancel_no_digits() -> None:
    """They are entire functions of hL: near 0 they are h times 1/2, 1/6, 1/3 and 1/6."""
    for linear in (np.array([0.0, -1e-9]), np.array([1e-9j])):
        weights = coefficients(linear, h=0.1)[2:]
        for weight, limit in zip(weights, (1 / 2, 1 / 6, 1 / 3, 1 / 6), strict=True):
            assert np.abs(weight - 0.1 * limit).max() < 1e-9


def test_march_solves_a_linear_equation_exactly() -> None:
    modes = Modes(np.array([1.0 + 0j]), np.array([-3.0]), lambda v: 0 * v, lambda v: v.real)
    assert modes.values(march(modes, steps=2, every=1))[:, 0] == pytest.approx([math.exp(-1.5), math.exp(-3)])


@pytest.mark.parametrize("nu", [0.0, -1e-3, math.nan, math.inf])
def test_a_coefficient_that_is_none(nu: float) -> None:
    with pytest.raises(ValueError, match=r"^Expected `solve\(nu=...\)` to be a positive number, got"):
        solve("burgers", nu)


def test_a_coefficient_too_small_for_the_grid() -> None:
    with pytest.raises(FloatingPointError, match=r"^Expected the solution of Burgers at nu = 0\.0002 to be finite"):
        solve("burgers", 2e-4)


def test_a_grid_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^Expected `solve\(points=...\)` to be a multiple of 512, got 1000"):
        solve("burgers", 0.1, points=1000)


def test_observations_are_64_points_of_the_grid() -> None:
    t, x = grid()
    assert observe(t[:, None])[:, 0] == pytest.approx(np.arange(1, 9) / 8)
    assert observe(x[None])[0] == pytest.approx(np.arange(-7, 8, 2) / 8)
    assert observe(torch.zeros(TIMES, POINTS)).shape == (8, 8)


@pytest.mark.parametrize("order", [2, 3])
def test_derivatives_of_the_net(order: int) -> None:
    """Carried forward through the layers they are those of nested reverse mode."""
    torch.manual_seed(0)
    net = pinn.Net(depth=4, width=6, order=order).double()
    t, x = torch.rand(2, 5, dtype=torch.float64).requires_grad_().unbind()
    jet = net(t, x)
    wanted = [jet[0]]
    wanted.append(torch.autograd.grad(jet[0].sum(), t, create_graph=True)[0])
    for _ in range(order):
        before = wanted[0] if len(wanted) == 2 else wanted[-1]
        wanted.append(torch.autograd.grad(before.sum(), x, create_graph=True)[0])
    assert torch.allclose(jet, torch.stack(wanted), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_loss_of_the_net_is_the_residual(name: str) -> None:
    """Compared with derivatives of û itself by nested reverse mode."""
    torch.manual_seed(0)
    equation = EQUATIONS[name]
    net = pinn.Net(depth=3, width=5, order=equation.order).double()
    points = pinn.collocation(equation, 7, torch.Generator().manual_seed(0)).double()
    nu = torch.tensor(0.3, dtype=torch.float64)

    def u(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return pinn.field(net, t, x, equation.initial(x))

    t, x = (row.clone().requires_grad_() for row in points[:2])
    jet = [u(t, x)]
    u_t = torch.autograd.grad(jet[0].sum(), t, create_graph=True)[0]
    for _ in range(equation.order):
        jet.append(torch.autograd.grad(jet[-1].sum(), x, create_graph=True)[0])
    residual = (u_t - equation.rate(*jet, nu)).square().mean()
    without_ends = pinn.loss(equation, net, points, nu) - ends(equation, net, points[0])
    assert torch.allclose(without_ends, residual, rtol=1e-5)  # collocation rounds to float32


def ends(equation, net: pinn.Net, t: torch.Tensor) -> torch.Tensor:
    """Return the mean square of what the boundary asks of NN."""
    right, left = net(t, torch.ones_like(t)), net(t, -torch.ones_like(t))
    if equation.boundary == "given":
        return torch.stack([right[0], left[0]]).square().mean()
    return (right - left)[[0, 2, 3]].square().mean()
