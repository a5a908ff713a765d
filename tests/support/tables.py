"""The tables that the tests run over: a new strategy, linear solver or direction sampler is one more row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from lightning_bilevel import (
    BOME,
    DARTS,
    FSLA,
    MEHA,
    PES,
    PZOBO,
    SOBA,
    BilevelModule,
    EvoGrad,
    FirstOrder,
    ForwardGradient,
    ForwardUnroll,
    GammaGreedy,
    HypergradientSchedule,
    HypergradientStrategy,
    ImplicitGradient,
    PenaltyGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
    tree,
)
from lightning_bilevel.directions import Blocks, Coordinate, Gaussian, Orthogonal, Rademacher, Sphere
from lightning_bilevel.linear_solvers import GMRES, ConjugateGradient, Dense, Identity, LinearSolver, Neumann, Nystrom


class Row(NamedTuple):
    """A strategy under test.

    Attributes:
        make: builds it, given T inner steps and N outer parameters.
        exact: whether it is exact as built here; ``None``: as its class says.
        tolerance: of an exact one, and of equal estimates along two paths; relative, in float64.
        needs: options of the ``BilevelModule`` without which it refuses.
        single: whether it takes one episode only.
        joint: whether it takes steps of θ that are no inner run.
        differences: whether it takes differences of gradients, which low precision spoils.
    """

    make: Callable[[int, int], HypergradientStrategy]
    exact: bool | None = None
    tolerance: float = 1e-9
    needs: dict[str, Any] = {}  # noqa: RUF012
    single: bool = False
    joint: bool = False
    differences: bool = False

    def build(self, module: BilevelModule) -> HypergradientStrategy:
        """Return the strategy for ``module``."""
        return self.make(module.inner_steps, tree.numel(module.functional().phi()))

    @property
    def strategy(self) -> HypergradientStrategy:
        """The strategy for some module; its class states the facts."""
        return self.make(2, 3)

    @property
    def is_exact(self) -> bool:
        return self.strategy.exact if self.exact is None else self.exact


SINGLE_LOOP: dict[str, Any] = {"inner_start": "warm", "inner_steps": 1}

ROWS: dict[str, Row] = {
    "ReverseUnroll": Row(lambda T, N: ReverseUnroll()),
    "ReverseUnroll-1": Row(lambda T, N: ReverseUnroll(checkpoint=1)),
    "ReverseUnroll-3": Row(lambda T, N: ReverseUnroll(checkpoint=3)),
    "ReverseUnroll-sqrt": Row(lambda T, N: ReverseUnroll(checkpoint="sqrt")),
    "TruncatedReverse": Row(lambda T, N: TruncatedReverse(steps=1)),
    "TruncatedReverse-T": Row(lambda T, N: TruncatedReverse(steps=T), exact=True),
    "ForwardUnroll": Row(lambda T, N: ForwardUnroll()),
    "ForwardUnroll-chunks": Row(lambda T, N: ForwardUnroll(chunk_size=N // 2 + 1, mode="double_backward")),
    "ForwardUnroll-forward": Row(lambda T, N: ForwardUnroll(mode="forward")),
    "ForwardUnroll-forward-chunks": Row(lambda T, N: ForwardUnroll(chunk_size=N // 2 + 1, mode="forward")),
    "ForwardGradient": Row(lambda T, N: ForwardGradient(num_directions=3)),
    "ForwardGradient-N": Row(lambda T, N: ForwardGradient(N, Orthogonal()), exact=True),
    "ForwardGradient-N-forward": Row(lambda T, N: ForwardGradient(N, Orthogonal(), mode="forward"), exact=True),
    "ForwardGradient-guided": Row(lambda T, N: ForwardGradient(3, guide=TruncatedReverse(steps=1))),
    "ForwardGradient-remembering": Row(lambda T, N: ForwardGradient(3, remember=True)),
    "ForwardGradient-guided-remembering": Row(
        lambda T, N: ForwardGradient(4, Blocks(), guide=[TruncatedReverse(1), GammaGreedy()], remember=True)
    ),
    "FirstOrder": Row(lambda T, N: FirstOrder()),
    "GammaGreedy": Row(lambda T, N: GammaGreedy(gamma=0.9)),
    "ImplicitGradient": Row(lambda T, N: ImplicitGradient(Neumann(terms=3, step_size=0.1))),
    "ImplicitGradient-warm": Row(lambda T, N: ImplicitGradient(Neumann(3, step_size=0.1), warm_start=True)),
    "ImplicitGradient-fresh": Row(lambda T, N: ImplicitGradient(Neumann(3, step_size=0.1), batches="fresh")),
    # λ magnifies the rounding of one path against another.
    "PenaltyGradient": Row(lambda T, N: PenaltyGradient(), tolerance=1e-8, differences=True),
    "PenaltyGradient-central": Row(lambda T, N: PenaltyGradient(30.0, "central"), tolerance=1e-8, differences=True),
    "EvoGrad": Row(lambda T, N: EvoGrad(3, sigma=0.1, temperature=0.1), tolerance=1e-8, differences=True),
    "DARTS": Row(lambda T, N: DARTS(), tolerance=1e-8, differences=True),
    "BOME": Row(lambda T, N: BOME(), needs=SINGLE_LOOP, single=True, joint=True, differences=True),
    "MEHA": Row(lambda T, N: MEHA(), needs=SINGLE_LOOP, single=True, joint=True, differences=True),
    "SOBA": Row(lambda T, N: SOBA(), needs=SINGLE_LOOP, single=True, joint=True),
    "SOBA-corrected": Row(lambda T, N: SOBA(momentum="corrected"), needs=SINGLE_LOOP, single=True, joint=True),
    "FSLA": Row(lambda T, N: FSLA(), needs=SINGLE_LOOP, single=True),
    # Differences over μ magnify the rounding of one path against another.
    "ZerothOrder": Row(lambda T, N: ZerothOrder(num_directions=3, mu=1e-3), tolerance=1e-7),
    "ZerothOrder-central": Row(lambda T, N: ZerothOrder(3, mu=1e-3, scheme="central"), tolerance=1e-7),
    "ZerothOrder-remembering": Row(lambda T, N: ZerothOrder(3, mu=1e-3, remember=True), tolerance=1e-7),
    "PZOBO": Row(lambda T, N: PZOBO(num_directions=3, mu=1e-3), tolerance=1e-7),
    "PZOBO-guided-remembering": Row(
        lambda T, N: PZOBO(4, mu=1e-3, guide=ZerothOrder(1, mu=1e-3), remember=True), tolerance=1e-7
    ),
    "PES": Row(lambda T, N: PES(num_directions=3, mu=1e-3), tolerance=1e-7),
    "HypergradientSchedule": Row(lambda T, N: HypergradientSchedule([(TruncatedReverse(1), 1), (FirstOrder(), None)])),
}

EXACT = {name: row for name, row in ROWS.items() if row.is_exact}
SEVERAL = {name: row for name, row in ROWS.items() if not row.single}

RUNS = {name: row for name, row in ROWS.items() if not row.joint}

every_strategy = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
every_strategy_with_an_inner_run = pytest.mark.parametrize("row", RUNS.values(), ids=RUNS)
every_exact_strategy = pytest.mark.parametrize("row", EXACT.values(), ids=EXACT)
every_strategy_of_several_episodes = pytest.mark.parametrize("row", SEVERAL.values(), ids=SEVERAL)

SOLVERS: dict[str, Callable[[], LinearSolver]] = {
    "Neumann": lambda: Neumann(terms=3, step_size=0.2),
    "ConjugateGradient": lambda: ConjugateGradient(max_iter=40),
    "Nystrom": lambda: Nystrom(rank=4),
    "Dense": Dense,
    "GMRES": lambda: GMRES(max_iter=40),
    "Identity": Identity,
}
every_solver = pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS)

SAMPLERS = [Rademacher(), Gaussian(), Sphere(), Coordinate(), Orthogonal(), Blocks(), Blocks(2)]
every_sampler = pytest.mark.parametrize(
    "sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__ + str(getattr(sampler, "blocks", None) or "")
)
