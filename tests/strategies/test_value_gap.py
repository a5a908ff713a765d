"""What moves θ and φ together refuses levels in which θ does not go on, and φ that no minimum depends on."""

from __future__ import annotations

import pytest

from lightning_bilevel import BOME, MEHA, HypergradientStrategy, hypergradient
from lightning_bilevel.errors import MisconfigurationError
from tests.support.problems import Mlp, Quadratic, RidgeSolver, episodes

joint = pytest.mark.parametrize("strategy", [BOME(), MEHA()], ids=["BOME", "MEHA"])


@joint
def test_refusals(strategy: HypergradientStrategy) -> None:
    name = type(strategy).__name__
    module = Quadratic(inner_steps=1)
    with pytest.raises(MisconfigurationError, match=f"^Cannot use `{name}` with an inner level that starts anew"):
        hypergradient(module, strategy, module.episode())
    module = Quadratic(inner_steps=1, shared=True)
    with pytest.raises(MisconfigurationError, match=f"^Cannot use `{name}` with parameters shared by both levels"):
        hypergradient(module, strategy, module.episode())
    learned = Mlp("SGD", inner_steps=1, inner_start="warm")
    with pytest.raises(MisconfigurationError, match=f"^Cannot use `{name}` with an inner optimizer that depends on"):
        hypergradient(learned, strategy, episodes(1))
    solver = RidgeSolver(inner_start="warm", inner_steps=1)
    with pytest.raises(MisconfigurationError, match=f"Cannot use `{name}` with `solve_inner`"):
        hypergradient(solver, strategy, solver.episode())
