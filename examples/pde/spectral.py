"""Spectral solutions of the equations: Fourier modes in x, exponential time differencing in t.

In Fourier space an equation is v_t = L v + N(v) with a diagonal L, which is stiff, and a nonlinear N, which is not.
ETDRK4 integrates L exactly and N as the classical Runge–Kutta method of order 4 does (Cox and Matthews, J. Comput.
Phys. 176, 2002); its coefficients are means over a circle in the complex plane, which cancels no digits (Kassam
and Trefethen, SIAM J. Sci. Comput. 26, 2005).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from lightning_bilevel.errors import nonfinite_error, value_error
from pde.equations import EQUATIONS, POINTS, TIMES

CIRCLE = np.exp(2j * np.pi * (np.arange(32) + 0.5) / 32)
Array = np.ndarray


class Modes(NamedTuple):
    """An equation in Fourier space, v_t = linear · v + nonlinear(v).

    Attributes:
        start: v at t = 0.
        linear: the diagonal of L.
        nonlinear: N.
        values: modes (..., m) to values of u (..., n) at the points.
    """

    start: Array
    linear: Array
    nonlinear: Callable[[Array], Array]
    values: Callable[[Array], Array]


def burgers(nu: float, start: Array) -> Modes:
    """Return u_t + u u_x = ν u_xx, periodic: an odd u stays odd, so that u(t, ±1) = 0 holds by itself."""
    return _advected(start, lambda k: -nu * k**2)


def kdv(nu: float, start: Array) -> Modes:
    """Return u_t + u u_x + ν u_xxx = 0, periodic."""
    return _advected(start, lambda k: 1j * nu * k**3)


def allen_cahn(nu: float, start: Array) -> Modes:
    """Return u_t = ν u_xx + 5 (u − u³) with u(t, ±1) = −1.

    w = u + 1 is 0 at both ends and solves w_t = ν w_xx − 10 w + 15 w² − 5 w³. It is continued oddly to twice the
    length, and w² with it. There the continued w has a jump in its fourth derivative: its modes decay as k⁻⁵.
    """
    n = len(start)
    w = start + 1
    w[0] = 0.0
    odd = np.concatenate([w, [0.0], -w[:0:-1]])
    half = np.where(np.arange(2 * n) < n, 1.0, -1.0)
    k = np.pi / 2 * np.arange(n + 1)

    def nonlinear(v: Array) -> Array:
        w = np.fft.irfft(v, 2 * n)
        return np.fft.rfft(w * w * (15 * half - 5 * w))

    return Modes(np.fft.rfft(odd), -nu * k**2 - 10, nonlinear, lambda v: np.fft.irfft(v, 2 * n)[..., :n] - 1)


class Scheme(NamedTuple):
    """What to take of an equation's modes, and how fine a grid the default accuracy needs.

    Attributes:
        modes: (ν, values at t = 0) to :class:`Modes`.
        points: in x; a multiple of 512.
        steps: in t; a multiple of 256.
    """

    modes: Callable[[float, Array], Modes]
    points: int
    steps: int


# With these, errors at the true ν are below 1e-6 of the solution; the tests refine them.
SCHEMES = {
    "burgers": Scheme(burgers, points=1024, steps=256),
    "allen-cahn": Scheme(allen_cahn, points=512, steps=256),
    "kdv": Scheme(kdv, points=512, steps=512),
}


def solve(name: str, nu: float, points: int | None = None, steps: int | None = None) -> Array:
    """Solve an equation.

    Args:
        name: a key of ``EQUATIONS``.
        nu: the coefficient, positive.
        points: in x, a multiple of 512.
        steps: in t, a multiple of 256.

    Returns:
        u of shape (256, 512), see :mod:`pde.equations`.

    Raises:
        ValueError: ``nu`` is not a positive number, or the grid does not contain the one of the solution.
        FloatingPointError: the solution overflows; at so small a ν the grid is too coarse.
    """
    if not (0 < nu < math.inf):
        raise value_error("solve(nu=...)", "a positive number", nu)
    equation, scheme = EQUATIONS[name], SCHEMES[name]
    points, steps = points or scheme.points, steps or scheme.steps
    for what, size, unit in (("points", points, POINTS), ("steps", steps, TIMES)):
        if size % unit:
            raise value_error(f"solve({what}=...)", f"a multiple of {unit}", size)
    x = torch.arange(points, dtype=torch.float64) * (2 / points) - 1
    modes = scheme.modes(nu, equation.initial(x).numpy())
    u = modes.values(march(modes, steps, steps // TIMES))
    if not np.isfinite(u).all():
        raise nonfinite_error(
            f"solution of {equation.title} at nu = {nu:.3g}",
            "nan or infinite values",
            f"{points} points and {steps} steps are too few for so small a coefficient: take more, or keep nu above "
            f"{equation.smallest:g}.",
        )
    return u[:, :: points // POINTS]


def march(modes: Modes, steps: int, every: int, end: float = 1.0) -> Array:
    """Integrate from t = 0 to ``end`` by ETDRK4; return the modes after each ``every`` steps, stacked."""
    decay, half, q, f1, f2, f3 = coefficients(modes.linear, end / steps)
    v, nonlinear, kept = modes.start, modes.nonlinear, []
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at the result
        for step in range(1, steps + 1):
            at_v, relaxed = nonlinear(v), half * v
            a = relaxed + q * at_v
            at_a = nonlinear(a)
            at_b = nonlinear(relaxed + q * at_a)
            at_c = nonlinear(half * a + q * (2 * at_b - at_v))
            v = decay * v + f1 * at_v + f2 * (at_a + at_b) + f3 * at_c
            if step % every == 0:
                kept.append(v)
    return np.stack(kept)


def coefficients(linear: Array, h: float) -> tuple[Array, ...]:
    """Return e^{hL}, e^{hL/2} and the four weights of ETDRK4, as means of their formulas over a circle around hL."""
    z = h * linear
    on_circle = z[:, None] + CIRCLE
    power = np.exp(on_circle)
    weights = (
        (np.exp(on_circle / 2) - 1) / on_circle,
        (-4 - on_circle + power * (4 - 3 * on_circle + on_circle**2)) / on_circle**3,
        2 * (2 + on_circle + power * (on_circle - 2)) / on_circle**3,
        (-4 - 3 * on_circle - on_circle**2 + power * (4 - on_circle)) / on_circle**3,
    )
    means = [h * weight.mean(1) for weight in weights]
    if np.isrealobj(linear):  # then the means are, too, and real arithmetic is faster
        means = [mean.real for mean in means]
    return np.exp(z), np.exp(z / 2), *means


def _advected(start: Array, symbol: Callable[[Array], Array]) -> Modes:
    """Return u_t + u u_x = L u, periodic on [-1, 1), with the symbol of L at the wave numbers k."""
    n = len(start)
    k = np.pi * np.arange(n // 2 + 1)
    k[-1] = 0.0  # the sawtooth mode has no odd derivative on the grid
    minus_half_derivative = -0.5j * k
    return Modes(
        np.fft.rfft(start),
        symbol(k),
        lambda v: minus_half_derivative * np.fft.rfft(np.fft.irfft(v, n) ** 2),
        lambda v: np.fft.irfft(v, n),
    )
