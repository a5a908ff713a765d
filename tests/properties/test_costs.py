"""What an estimate costs: evaluations of the losses, gradients, gradients with a graph, and products with a graph.

This guards speed without a clock. A product is a vector-Jacobian product with a graph of a gradient: a Hessian product,
a mixed product, or one backward pass through a stretch of the inner run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import ceil, sqrt
from typing import Any

import pytest
import torch
from torch.overrides import _len_torch_function_stack

from lightning_bilevel import (
    BOME,
    DARTS,
    FSLA,
    MEHA,
    PES,
    PZOBO,
    SOBA,
    EvoGrad,
    FirstOrder,
    ForwardGradient,
    ForwardUnroll,
    GammaGreedy,
    HypergradientStrategy,
    ImplicitGradient,
    PenaltyGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
    tree,
)
from lightning_bilevel.linear_solvers import ConjugateGradient, Identity, Neumann
from lightning_bilevel.problem import Carry
from lightning_bilevel.training.estimating import estimating
from tests.support.problems import Mlp, episodes
from tests.support.seeds import call_of

T, N = 7, 5  # N is the module's number of outer parameters, see the test of it


def costs(
    strategy: HypergradientStrategy, monkeypatch: pytest.MonkeyPatch, steps: int = T, number: int = 1
) -> dict[str, int]:
    """Count on one estimate, by way of the problem's functions and of ``torch.autograd.grad``.

    Args:
        strategy: makes it.
        monkeypatch: of the test.
        steps: T.
        number: of the estimate that is counted, among several of which each goes on from the last.
    """
    module = Mlp("SGD", learned=False)
    module.inner_steps, (episode,) = steps, episodes(1)
    functional, counted, original = module.functional(), Counter(), torch.autograd.grad

    def spied(name: str, function: Any) -> Any:
        def spy(*args: Any) -> Any:
            counted[name] += 1
            return function(*args)

        return spy

    def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        with_graph = kwargs.get("create_graph", False)
        if _len_torch_function_stack():  # it comes again, as what the mode calls
            return original(outputs, inputs, grad_outputs, *args, **kwargs)
        counted["graphs" if with_graph else "gradients" if grad_outputs is None else "products"] += 1
        return original(outputs, inputs, grad_outputs, *args, **kwargs)

    with estimating(functional, module.fit_context.memory, [episode], call_of().key) as at:
        losses = {name: spied(name, getattr(at.problem, name)) for name in ("inner_loss", "outer_loss")}
        problem, carry = replace(at.problem, **losses), Carry(at.carried[0], at.kept)
        for _ in range(number):
            counted.clear()
            with monkeypatch.context() as patch:
                patch.setattr(torch.autograd, "grad", grad)
                carry = strategy.estimate(problem, carry, at.phi, episode, call_of()).carry
    return dict(counted)


def expected(inner: int, outer: int, gradients: int = 0, graphs: int = 0, products: int = 0) -> dict[str, int]:
    """Name the counts, and leave out what is not there."""
    names = ("inner_loss", "outer_loss", "gradients", "graphs", "products")
    return {name: n for name, n in zip(names, (inner, outer, gradients, graphs, products), strict=True) if n}


S = ceil(sqrt(3 * T))  # stretches, the last of one step
COSTS: dict[str, tuple[HypergradientStrategy, dict[str, int]]] = {
    # T steps with a graph each, and one backward pass through them and the outer loss.
    "reverse": (ReverseUnroll(), expected(T, 1, gradients=1, graphs=T)),
    # All but the last stretch twice, without and with a graph; d = ∂f/∂θ, one product for each stretch.
    "reverse, sqrt": (ReverseUnroll("sqrt"), expected(2 * T - 1, 1, gradients=T - 1 + 1, graphs=T, products=S)),
    "reverse, 3": (ReverseUnroll(3), expected(2 * T - 1, 1, gradients=T - 1 + 1, graphs=T, products=3)),
    "truncated": (TruncatedReverse(3), expected(T, 1, gradients=T - 3 + 1, graphs=3, products=1)),
    # One graph a step for all directions of a chunk, and T products for each direction.
    "forward": (ForwardUnroll(), expected(T, 1, gradients=1, graphs=T, products=T * N)),
    "forward gradient": (ForwardGradient(5), expected(T, 1, gradients=1, graphs=T, products=5 * T)),
    "two chunks": (ForwardGradient(5, chunk_size=3), expected(2 * T, 2, gradients=2, graphs=2 * T, products=5 * T)),
    "guided": (
        ForwardGradient(5, guide=TruncatedReverse(3)),
        expected(2 * T, 2, gradients=1 + T - 3 + 1, graphs=T + 3, products=5 * T + 1),
    ),
    # What is known are some of the b directions; a guide costs what it costs alone.
    "guided and remembering": (
        ForwardGradient(5, guide=TruncatedReverse(1), remember=True),
        expected(2 * T, 2, gradients=1 + T - 1 + 1, graphs=T + 1, products=5 * T + 1),
    ),
    "zeroth order, remembering": (ZerothOrder(4, chunk_size=1, remember=True), expected(5 * T, 5, gradients=5 * T)),
    "zeroth order": (ZerothOrder(4, chunk_size=1), expected(5 * T, 5, gradients=5 * T)),
    "central": (ZerothOrder(4, scheme="central", chunk_size=1), expected(9 * T, 9, gradients=9 * T)),
    # The base run, all others at once, and at the first estimate one of them alone to compare with.
    "zeroth order, vectorized": (ZerothOrder(4), expected(3 * T, 3, gradients=3 * T)),
    # Pairs, whether their states have gone on or not.
    "PES": (PES(2, chunk_size=1), expected(5 * T, 5, gradients=5 * T)),
    # The outer loss is differentiated once, and evaluated nowhere else.
    "PZOBO": (PZOBO(4, chunk_size=1), expected(5 * T, 1, gradients=5 * T + 1)),
    # The first term is free.
    "Neumann": (
        ImplicitGradient(Neumann(terms=4, step_size=0.1)),
        expected(T + 1, 1, gradients=T + 1, graphs=1, products=3 + 1),
    ),
    "Hessian-free": (ImplicitGradient(Identity(scale=0.1)), expected(T + 1, 1, gradients=T + 1, graphs=1, products=1)),
    "gamma-greedy": (GammaGreedy(), expected(T, T, gradients=T, graphs=T, products=T)),
    # g and its gradient by φ at both sides of the last step's beginning; a product with the rule alone.
    "DARTS": (DARTS(), expected(T + 2, 1, gradients=T + 1 + 2, products=1)),
    # A gradient by φ for each copy; the value, and f at the mean.
    "EvoGrad": (EvoGrad(3), expected(T + 3, 2, gradients=T + 3 + 1)),
    # Both gradients of g at θ, that by φ at the end, for each of two batches; f before and after.
    "BOME": (BOME(), expected(T + 4, 2, gradients=T + 4 + 1)),
    "first order": (FirstOrder(), expected(T, 1, gradients=T + 1)),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_those_of_the_formula(name, monkeypatch):
    strategy, cost = COSTS[name]
    assert costs(strategy, monkeypatch) == cost


@pytest.mark.parametrize(("scheme", "others"), [("forward", 1), ("central", 2)])
def test_penalties_cost_runs_and_gradients_by_phi(scheme, others, monkeypatch):
    """Its second estimate; at the first it looks at the dtypes of the inner loss."""
    # g in every step of every run, and at two ends for every batch; f in every step of the others, at their ends, and
    # its value.
    at_ends = 2 * len(episodes(1)[0].inner)
    inner, outer = T * (1 + others) + at_ends, T * others + others + 1
    found = costs(PenaltyGradient(scheme=scheme), monkeypatch, number=2)
    assert found == expected(inner, outer, gradients=T * (1 + others) + at_ends + others)


@pytest.mark.filterwarnings("ignore:.*reached a relative residual")
def test_conjugate_gradients_take_one_product_an_iteration(monkeypatch):
    """And one for the first residual at most."""
    found = costs(ImplicitGradient(ConjugateGradient(max_iter=4, tol=1e-300, damping=10.0)), monkeypatch)
    assert found["products"] in (4 + 1, 4 + 2)


def test_the_single_loop_costs_one_step_one_hessian_product_and_two_mixed_ones(monkeypatch):
    """Its second step; the first has nothing to correct yet."""
    # f at two places and once more for v; one gradient of the step, three of f, three graphs of inner gradients.
    assert costs(FSLA(), monkeypatch, steps=1, number=2) == expected(1 + 3, 3, gradients=1 + 3, graphs=3, products=3)


def test_single_loops_of_first_order_and_at_one_point(monkeypatch):
    # Two steps, of which one has f in it, and the gradient by φ of g at both ends; f there, and at the new θ.
    assert costs(MEHA(), monkeypatch, steps=1) == expected(2 + 2, 3, gradients=2 + 2 + 1)
    # Of two batches, each has a graph, which serves both products; the loss of the step is evaluated once more.
    assert costs(SOBA(), monkeypatch, steps=1) == expected(1 + 2, 2, gradients=1, graphs=2, products=2)
    second = costs(SOBA(momentum="corrected"), monkeypatch, steps=1, number=2)
    assert second == expected(1 + 4, 3, gradients=2, graphs=4, products=4)


def test_the_number_of_outer_parameters():
    assert tree.numel(Mlp("SGD", learned=False).functional().phi()) == N


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_too_short_for_checkpoints_has_no_empty_stretch(steps, monkeypatch):
    """⌈√(3T)⌉ is more than T there; a step each, and only the last is not taken again. One alone is one graph."""
    products = steps if steps > 1 else 0
    cost = expected(2 * steps - 1, 1, gradients=steps - 1 + 1, graphs=steps, products=products)
    assert costs(ReverseUnroll("sqrt"), monkeypatch, steps) == cost


def test_counts_grow_with_the_work(monkeypatch):
    """The spy can see a wasted step."""
    assert costs(ReverseUnroll(), monkeypatch, steps=T + 1) != COSTS["reverse"][1]
