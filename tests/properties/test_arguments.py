"""Bad arguments, and calls without what they need, are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    ForwardGradient,
    ForwardUnroll,
    GammaGreedy,
    HypergradientMonitor,
    HypergradientSchedule,
    ImplicitGradient,
    PenaltyGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
    hypergradient,
)
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Identity
from tests.support.spoilt import EPISODE, X, Y, net, without_levels, zeros

CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # BilevelModule(...)
    "inner_steps": (
        lambda: net({"inner_steps": 0}),
        ValueError,
        r"Expected `BilevelModule\(inner_steps=\.\.\.\)` to be a positive integer, got 0\.",
    ),
    "inner_start": (
        lambda: net({"inner_start": "cold"}),
        ValueError,
        r"Expected `BilevelModule\(inner_start=\.\.\.\)` to be 'warm' or 'reset' or 'reinit' or 'rollback', got 'cold'",
    ),
    "proximal": (
        lambda: net({"proximal": float("nan")}),
        ValueError,
        r"Expected `BilevelModule\(proximal=\.\.\.\)` to be a non-negative number, got nan\.",
    ),
    "episode_chunk_size": (
        lambda: net({"episode_chunk_size": 1.5}),
        ValueError,
        r"Expected `BilevelModule\(episode_chunk_size=\.\.\.\)` to be a positive integer, got 1\.5\.",
    ),
    # Hooks called without a default
    "super().inner_loss": (
        lambda: BilevelModule.inner_loss(net(), None),
        MisconfigurationError,
        "`Net` has no `inner_",
    ),
    "super().outer_loss": (
        lambda: BilevelModule.outer_loss(net(), None),
        MisconfigurationError,
        "`Net` has no `outer_",
    ),
    "super().configure_inner_optimizer": (
        lambda: BilevelModule.configure_inner_optimizer(net()),
        MisconfigurationError,
        "`Net` has no `configure_inner_optimizer`",
    ),
    "super().solve_inner": (
        lambda: BilevelModule.solve_inner(net(), None),
        MisconfigurationError,
        r"`Net` has no `solve_inner`\. Add `def solve_inner\(self, batches\)",
    ),
    "outer_parameters of neither": (
        lambda: without_levels().outer_parameters(),
        MisconfigurationError,
        "`Net` has no `inner_parameters`",
    ),
    # Without a Trainer
    "hypergradient without hooks": (
        lambda: hypergradient(net(outer_loss=None), ReverseUnroll(), EPISODE),
        MisconfigurationError,
        "`Net` has no `outer_loss`",
    ),
    "hypergradient of nothing": (
        lambda: hypergradient(net(), ReverseUnroll(), []),
        ValueError,
        r"Expected `Net\.episodes\(batch\)` to be at least one episode, got \[\]",
    ),
    "hypergradient of a refused combination": (
        lambda: hypergradient(net(inner_loss=None, solve_inner=zeros), FSLA(), EPISODE),
        MisconfigurationError,
        "Cannot use `FSLA` with `solve_inner`",
    ),
    "training_step without a fit": (
        lambda: net().training_step(EPISODE),
        MisconfigurationError,
        "`Net` has no hypergradient strategy",
    ),
    "adapted to nothing": (
        lambda: net().adapted([]).__enter__(),
        ValueError,
        r"Expected `Episode\(inner=\.\.\.\)` to be a list of at least one inner batch, got 'none'",
    ),
    "adapted to a tensor": (
        lambda: net().adapted(X).__enter__(),
        ValueError,
        r"Expected `Episode\(inner=\.\.\.\)` to be a list of at least one inner batch, got 'Tensor'",
    ),
    "adapted by negative steps": (
        lambda: net().adapted([(X, Y)], steps=-1).__enter__(),
        ValueError,
        r"Expected `adapted\(steps=\.\.\.\)` to be a non-negative integer, got -1\.",
    ),
    "adapted with no inner loss": (
        lambda: net(inner_loss=None).adapted([(X, Y)]).__enter__(),
        MisconfigurationError,
        "`Net` has no `inner_loss`",
    ),
}

# Constructors of callbacks: a bad value of one argument, and what it is expected to be.
POSITIVE = "a positive integer"
ARGUMENTS: list[tuple[Callable[..., Any], dict[str, Any], str, str]] = [
    (ReverseUnroll, {"checkpoint": 0}, "checkpoint", "None, a positive integer or 'sqrt'"),
    (ReverseUnroll, {"checkpoint": "log"}, "checkpoint", "None, a positive integer or 'sqrt'"),
    (TruncatedReverse, {"steps": 0}, "steps", POSITIVE),
    (ForwardUnroll, {"chunk_size": 0}, "chunk_size", POSITIVE),
    (ForwardUnroll, {"mode": "reverse"}, "mode", "'auto' or 'double_backward' or 'forward'"),
    (ForwardGradient, {"num_directions": 0}, "num_directions", POSITIVE),
    (ForwardGradient, {"num_directions": True}, "num_directions", POSITIVE),
    (ForwardGradient, {"num_directions": 1, "guide": TruncatedReverse()}, "num_directions", "at least 2 with a guide"),
    (ForwardGradient, {"chunk_size": 2.0}, "chunk_size", POSITIVE),
    (ForwardGradient, {"mode": "fast"}, "mode", "'auto' or 'double_backward' or 'forward'"),
    (ZerothOrder, {"num_directions": 0}, "num_directions", POSITIVE),
    (ZerothOrder, {"mu": 0.0}, "mu", "a positive number"),
    (ZerothOrder, {"scheme": "backward"}, "scheme", "'forward' or 'central'"),
    (ZerothOrder, {"chunk_size": 0}, "chunk_size", POSITIVE),
    (PES, {"num_directions": 0}, "num_directions", POSITIVE),
    (PES, {"mu": -1.0}, "mu", "a positive number"),
    (PES, {"chunk_size": 0}, "chunk_size", POSITIVE),
    (PZOBO, {"num_directions": -1}, "num_directions", POSITIVE),
    (PZOBO, {"mu": float("inf")}, "mu", "a positive number"),
    (PZOBO, {"chunk_size": 0}, "chunk_size", POSITIVE),
    (ImplicitGradient, {"solver": "cg"}, "solver", "a linear solver such as `Neumann(10, step_size=lr)`"),
    (PenaltyGradient, {"penalty": 0.0}, "penalty", "a positive number"),
    (PenaltyGradient, {"scheme": "backward"}, "scheme", "'forward' or 'central'"),
    (ImplicitGradient, {"solver": Identity(), "batches": "all"}, "batches", "'one' or 'fresh'"),
    (ImplicitGradient, {"solver": Identity(), "warm_start": "yes"}, "warm_start", "True or False"),
    (ImplicitGradient, {"solver": Identity(), "warm_start": 1}, "warm_start", "True or False"),
    (SOBA, {"tau": 0.0}, "tau", "a positive number"),
    (SOBA, {"beta": -1.0}, "beta", "a positive number"),
    (SOBA, {"eta": 1.5}, "eta", "a number in (0, 1]"),
    (SOBA, {"momentum": "nesterov"}, "momentum", "'none' or 'average' or 'corrected' or 'recursive' or 'table'"),
    (BOME, {"lr": 0.0}, "lr", "a positive number"),
    (BOME, {"eta": 0.0}, "eta", "a positive number"),
    (BOME, {"barrier": "log"}, "barrier", "'gradient' or 'gap'"),
    (MEHA, {"gamma": 0.0}, "gamma", "a positive number"),
    (MEHA, {"penalty": 0.0}, "penalty", "a positive number"),
    (MEHA, {"power": 0.6}, "power", "a number in [0, 0.5]"),
    (DARTS, {"radius": 0.0}, "radius", "a positive number"),
    (EvoGrad, {"num_copies": 1}, "num_copies", "an integer of at least 2"),
    (EvoGrad, {"sigma": 0.0}, "sigma", "a positive number"),
    (EvoGrad, {"temperature": 0.0}, "temperature", "a positive number"),
    (GammaGreedy, {"gamma": 1.5}, "gamma", "a number in [0, 1]"),
    (FSLA, {"beta": 0}, "beta", "a positive number"),
    (FSLA, {"tau": -1.0}, "tau", "a positive number"),
    (FSLA, {"eta": 1.5}, "eta", "a number in (0, 1]"),
    (FSLA, {"schedule": "linear"}, "schedule", "'constant' or 'inverse_sqrt'"),
    (HypergradientSchedule, {"phases": []}, "phases", "a list of (strategy, steps) that ends with (strategy, None)"),
    (HypergradientMonitor, {"every_n_steps": 0}, "every_n_steps", POSITIVE),
    (HypergradientMonitor, {"samples": 1}, "samples", "0, or an integer of at least 2"),
]


@pytest.mark.parametrize("name", CALLS)
def test_calls_refuse(name):
    call, error, message = CALLS[name]
    with pytest.raises(error, match=f"^{message}"):
        call()


@pytest.mark.parametrize(("owner", "arguments", "bad", "expected"), ARGUMENTS, ids=lambda value: str(value)[:40])
def test_constructors_refuse(owner, arguments, bad, expected):
    with pytest.raises(ValueError, match="^Expected") as caught:
        owner(**arguments)
    assert str(caught.value).startswith(f"Expected `{owner.__name__}({bad}=...)` to be {expected}, got")
    assert repr(arguments[bad]) in str(caught.value)


def test_a_phase_needs_its_steps():
    message = r"^Expected `HypergradientSchedule steps of TruncatedReverse` to be a positive integer, got 0\."
    with pytest.raises(ValueError, match=message):
        HypergradientSchedule([(TruncatedReverse(), 0), (ReverseUnroll(), None)])
