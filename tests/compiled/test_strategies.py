"""Every strategy estimates the same by graphs, and computes what docs/compiled.md says by graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_bilevel import FSLA, PZOBO, SGD, ImplicitGradient, ZerothOrder, hypergradient
from lightning_bilevel.compiled import evaluation, plan
from lightning_bilevel.linear_solvers import ConjugateGradient, Neumann
from lightning_bilevel.strategies.base import every_strategy
from tests.support.compiled import apart, episode, weighted
from tests.support.tables import ROWS, SINGLE_LOOP, Row


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return a set that has the name of each function that a graph is made of."""
    seen: set[str] = set()

    def noting(original: Any) -> Any:
        def call(functions: Any, name: str, *args: Any) -> Any:
            seen.add(name)
            return original(functions, name, *args)

        return call

    monkeypatch.setattr(plan, "made", noting(plan.made))
    monkeypatch.setattr(evaluation, "evaluation", noting(evaluation.evaluation))
    return seen


STEP, BACK, PUSH, VALUE, OUTER = {"take"}, {"pull"}, {"push"}, {"outer"}, {"outer_slopes"}
OF_PHI, PRODUCTS = {"inner_slopes_by_phi"}, {"curvature"}

PARTS = {
    "ReverseUnroll": BACK | OUTER,
    "ReverseUnroll-1": STEP | BACK | OUTER,
    "ReverseUnroll-sqrt": STEP | BACK | OUTER,
    "TruncatedReverse": STEP | BACK | OUTER,
    "ForwardUnroll": PUSH | OUTER,
    "ForwardUnroll-forward": PUSH | OUTER,
    "ForwardGradient": PUSH | OUTER,
    "ForwardGradient-N-forward": PUSH | OUTER,
    "ForwardGradient-guided": STEP | BACK | PUSH | OUTER,
    "FirstOrder": STEP | OUTER,
    "GammaGreedy": BACK | OUTER,
    "ImplicitGradient": STEP | PRODUCTS | OUTER,
    "ImplicitGradient-warm": STEP | PRODUCTS | OUTER,
    "ImplicitGradient-fresh": STEP | PRODUCTS | OUTER,
    "PenaltyGradient": STEP | OF_PHI | VALUE | OUTER,
    "PenaltyGradient-central": STEP | OF_PHI | VALUE | OUTER,
    "EvoGrad": STEP | OF_PHI | VALUE | OUTER,
    "DARTS": STEP | {"rule"} | OF_PHI | OUTER,
    "BOME": STEP | OF_PHI | VALUE | OUTER | {"inner_slopes"},
    "MEHA": STEP | OF_PHI | VALUE | OUTER,
    "SOBA": PRODUCTS | VALUE | OUTER,
    "SOBA-corrected": PRODUCTS | VALUE | OUTER,
    "FSLA": STEP | PRODUCTS | OUTER,
    "ZerothOrder": STEP | VALUE,
    "PES": STEP | VALUE,
    "PZOBO": STEP | OUTER,
    "HypergradientSchedule": STEP | BACK | OUTER,
}
"""What is computed by graphs, of one of each kind."""

ROWS_HERE = {name: ROWS[name] for name in PARTS} | {
    "ImplicitGradient-fixed-point": Row(lambda T, N: ImplicitGradient(Neumann(3, step_size=1.0), form="fixed_point")),
    "ImplicitGradient-CG": Row(lambda T, N: ImplicitGradient(ConjugateGradient(max_iter=40, tol=1e-4))),
    "FSLA-tau": Row(lambda T, N: FSLA(tau=0.1), needs=SINGLE_LOOP),
}
PARTS |= {
    "ImplicitGradient-fixed-point": STEP | BACK | OUTER,
    "ImplicitGradient-CG": STEP | PRODUCTS | OUTER,
    "FSLA-tau": STEP | PRODUCTS | OUTER,
}


SLOW = {
    "ReverseUnroll", "TruncatedReverse", "ForwardUnroll-forward", "ForwardGradient", "ForwardGradient-guided",
    "ImplicitGradient-warm", "ImplicitGradient-CG", "SOBA", "PenaltyGradient-central", "ForwardGradient-N-forward",
}  # fmt: skip
"""There is another one of their kind, here or in ``test_step.py``."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ROWS_HERE]
)
def test_every_strategy(name: str, made: set[str]) -> None:
    row = ROWS_HERE[name]
    module = weighted(**row.needs, optimizer=lambda module: SGD(lr=0.3, weight_decay=0.01))
    module.log_lr.requires_grad_(False)
    carries = [None, None]
    ours, eager = row.build(module), row.build(module)
    for turn in range(3):
        found = []
        for which, strategy in enumerate((ours, eager)):
            module.compiles_steps = which == 0
            found.append(hypergradient(module, strategy, episode(turn), carry=carries[which]))
            carries[which] = found[-1].carry
        assert apart(*found) < 2e-6
    assert made == PARTS[name]


def test_every_strategy_is_here() -> None:
    assert {kind.__name__ for kind in every_strategy()} == {name.partition("-")[0] for name in PARTS}


@pytest.mark.parametrize("kind", [PZOBO, ZerothOrder])
def test_graphs_hide_no_rounding_from_differences(kind: Any, made: set[str]) -> None:
    module = weighted(optimizer=lambda module: SGD(lr=0.3))
    words = rf"`{kind.__name__}\(mu=0.01\)` is small for torch.bfloat16"
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match=words) as caught:
            first = hypergradient(module, kind(2, mu=0.01, chunk_size=1), episode())
        again = hypergradient(
            module, kind(2, mu=0.01, chunk_size=1), episode()
        )  # there is one look, which changes nothing
    assert not [each for each in caught if "compiled" in str(each.message)]
    assert made
    for name, value in first.grads.items():
        assert torch.equal(again.grads[name], value)
