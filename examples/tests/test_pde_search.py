"""The search over ν and the descent along differences, on fields in closed form in place of the spectral solver."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pde import search as module
from pde.equations import EQUATIONS, grid, observe


def wave(name: str, nu: float) -> np.ndarray:
    """Return a field whose distance from another one has local minima, as that of Korteweg–de Vries has."""
    t, x = grid()
    return np.sin(x[None] + 4 * math.log(nu) * t[:, None])


def test_it_finds_the_least_of_several_minima(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "solve", wave)
    found = module.search("kdv", observe(wave("kdv", 0.0031)))
    assert found.nu == pytest.approx(0.0031, rel=1e-5)
    assert found.loss < 1e-9
    assert 20 < found.solutions < 60


def test_a_solution_that_is_not_finite_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "solve", lambda name, nu: wave(name, nu) * (math.nan if nu < 0.002 else 1.0))
    found = module.search("kdv", observe(wave("kdv", 0.0031)))
    assert found.nu == pytest.approx(0.0031, rel=1e-5)


def test_the_least_may_be_at_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "solve", lambda name, nu: np.full(tuple(map(len, grid())), nu))
    found = module.search("kdv", np.full((8, 8), 1.0))
    assert found.nu == pytest.approx(EQUATIONS["kdv"].largest_start)


def test_differences_go_downhill_to_the_nearest_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "solve", wave)
    near, far = (module.descend("kdv", observe(wave("kdv", 0.0031)), start) for start in (0.0025, 0.0003))
    assert near.nu == pytest.approx(0.0031, rel=1e-3)
    assert near.loss < 1e-5 < 1e-2 < far.loss
    assert near.solutions == 300


def test_a_descent_ends_at_the_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "solve", lambda name, nu: np.full(tuple(map(len, grid())), math.log(nu)))
    found = module.descend("kdv", np.full((8, 8), 1.0), start=0.005, steps=20)
    assert found.nu == pytest.approx(EQUATIONS["kdv"].largest_start)
