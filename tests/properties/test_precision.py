"""Precisions of the Trainer: what they do to every strategy, and what is said about it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_bilevel import (
    PZOBO,
    SGD,
    BilevelModule,
    Episode,
    FirstOrder,
    HypergradientStrategy,
    ReverseUnroll,
    ZerothOrder,
    hypergradient,
)
from lightning_bilevel.strategies.rounding import CoarsestDtype
from lightning_bilevel.training.precision import warn_of_precision
from tests.support.modules import EXAMPLES, FEATURES, examples, listed, seeded, trainer
from tests.support.problems import RidgeBlackBox
from tests.support.tables import ROWS, Row

DIFFERENCES = {
    name: row for name, row in ROWS.items() if not row.strategy.second_order and row.strategy.requires == "solve"
}
DIFFERENCES.pop("FirstOrder")
DERIVATIVES = {name: row for name, row in ROWS.items() if name not in DIFFERENCES}

every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
every_derivative = pytest.mark.parametrize("row", DERIVATIVES.values(), ids=DERIVATIVES)
every_difference = pytest.mark.parametrize("row", DIFFERENCES.values(), ids=DIFFERENCES)
expected_words = pytest.mark.filterwarnings("ignore:With `Trainer.precision", "ignore:`(PZOBO|ZerothOrder)")


class Cleaning(BilevelModule):
    """Example weights outside, which both losses read; a net inside, under plain descent: all strategies take it.

    Args:
        factor: of both losses; the inner learning rate is divided by it, so that the run is the same.
        options: of ``BilevelModule``.
    """

    def __init__(self, factor: float = 1.0, **options: Any) -> None:
        super().__init__(**{"inner_steps": 3, "inner_start": "reset", **options})
        self.net = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1))
        self.example_weights = nn.Parameter(torch.linspace(-1, 1, EXAMPLES))
        self.factor, self.found = factor, torch.zeros(())

    def inner_parameters(self) -> Any:
        return self.net

    def inner_loss(self, batch: Any) -> Tensor:
        x, y, index = batch
        return self.factor * (self.example_weights[index].sigmoid() * (self.net(x) - y).square().mean(1)).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        error = (self.net(batch[0]) - batch[1]).square().mean()  # PyTorch 2.4 has no `mse_loss` in half precision
        return self.factor * (error + 0.001 * self.example_weights.square().sum())

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.3 / self.factor)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.outer_parameters(), lr=0.1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.found = self.example_weights.grad.clone()


def made(row: Row, **options: Any) -> tuple[Cleaning, HypergradientStrategy]:
    module = seeded(lambda: Cleaning(**row.needs, **options))
    return module, row.build(module)


EPISODE = Episode([examples(0)], examples(1)[:2])


def fitted(module: Cleaning, strategy: HypergradientStrategy, **options: Any) -> Tensor:
    """Take one step of a real fit; return the gradient that the outer optimizer got."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        trainer(strategy, **options).fit(module, listed([EPISODE]))
    return module.found


def by_hand(module: Cleaning, strategy: HypergradientStrategy, dtype: torch.dtype) -> Tensor:
    episode = tree_map(lambda value: value.to(dtype) if value.is_floating_point() else value, EPISODE)
    return hypergradient(module.to(dtype), strategy, episode, seed=3).grads["example_weights"]


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def half(device: str = "cpu") -> dict[str, Any]:
    """Return the option of a Trainer for 16-mixed on a CPU, which Lightning replaces if asked by name."""
    return {"plugins": [MixedPrecision("16-mixed", device)]}


# ---------------------------------------------------------------------------------------------------------------------
# Every strategy
# ---------------------------------------------------------------------------------------------------------------------


@every_row
def test_64_true_is_float64(row: Row) -> None:
    module, strategy = made(row)
    found = fitted(module, strategy, precision="64-true")
    assert found.dtype == torch.float64
    assert error(found, by_hand(*made(row), torch.float64)) < 1e-9 * (1 if row.tolerance < 1e-8 else 100)


@every_derivative
def test_bf16_mixed_is_close_to_float32(row: Row) -> None:
    """Two to three digits: those of bfloat16, in which the losses are computed."""
    module, strategy = made(row)
    found = fitted(module, strategy, precision="bf16-mixed")
    assert found.dtype == torch.float32
    assert module.net[0].weight.dtype == torch.float32
    expected = by_hand(*made(row), torch.float32)
    assert torch.cosine_similarity(found, expected, dim=0) > 0.9995
    assert error(found, expected) < 0.03
    assert torch.equal(found, expected) == isinstance(strategy, FirstOrder)  # it has only what is float32 here


@every_difference
def test_bf16_mixed_differences_want_a_larger_mu(row: Row) -> None:
    module, strategy = made(row)
    with pytest.warns(UserWarning, match=r"^`(PZOBO|ZerothOrder)\(mu=0\.001\)` is small for torch\.bfloat16"):
        wrong = fitted(module, strategy, precision="bf16-mixed")
    expected = by_hand(*made(row), torch.float32)
    assert error(wrong, expected) > 0.1
    module, strategy = made(row)
    strategy.mu = 0.3
    right = fitted(module, strategy, precision="bf16-mixed")
    module, strategy = made(row)
    strategy.mu = 0.3
    assert error(right, by_hand(module, strategy, torch.float32)) < 0.1


@expected_words
@every_derivative
@pytest.mark.parametrize(("precision", "worst"), [("bf16-true", 0.05), ("16-true", 0.01)])
def test_half_precision_parameters(row: Row, precision: str, worst: float) -> None:
    module, strategy = made(row)
    found = fitted(module, strategy, precision=precision)
    assert found.dtype == {"bf16-true": torch.bfloat16, "16-true": torch.float16}[precision]
    assert 0 < error(found, by_hand(*made(row), torch.float32)) < worst


@expected_words
@every_derivative
def test_16_mixed(row: Row) -> None:
    """With the gradient scaler that Lightning uses: its factor is gone from the hypergradient, bit for bit."""
    module, strategy = made(row)
    found = fitted(module, strategy, **half())
    assert error(found, by_hand(*made(row), torch.float32)) < 0.01
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(found, by_hand(*made(row), torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# What is said about a precision
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (half(), r"^With `Trainer\(precision='16-mixed'\)` the gradient scaler multiplies the outer loss only\. Inner"),
        ({"precision": "16-true"}, r"^With `Trainer\(precision='16-true'\)` nothing scales gradients, so"),
        ({"precision": "bf16-true"}, r"^With `Trainer\(precision='bf16-true'\)` parameters keep 8 bits: inner and"),
    ],
)
def test_a_fit_says_what_its_precision_does(options: dict[str, Any], message: str) -> None:
    module = seeded(Cleaning)
    with pytest.warns(UserWarning, match=f"{message}.*Use `Trainer\\(precision='bf16-mixed'\\)` or '32-true'\\.$"):
        fitted(module, ReverseUnroll(), **options)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_other_precisions_need_no_word(precision: str) -> None:
    warn_of_precision(trainer(precision=precision))


def test_what_nothing_scales_is_lost_in_float16() -> None:
    """The reason for the warning: with small losses, inner gradients of float16 are zero, those of bfloat16 are not."""
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        for factor in (1.0, 1e-8):
            with torch.autocast("cpu", dtype):
                found = by_hand(seeded(lambda factor=factor: Cleaning(factor)), ReverseUnroll(), torch.float32)
            exact = by_hand(seeded(lambda factor=factor: Cleaning(factor)), ReverseUnroll(), torch.float64)
            errors[dtype, factor] = error(found, exact)
    assert errors[torch.float16, 1.0] < 0.01
    assert errors[torch.float16, 1e-8] > 0.9
    assert errors[torch.bfloat16, 1.0] < 0.03
    assert errors[torch.bfloat16, 1e-8] < 0.03


# ---------------------------------------------------------------------------------------------------------------------
# What finite differences say about μ
# ---------------------------------------------------------------------------------------------------------------------

FLOAT, DOUBLE, BRAIN, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("strategy", "stored", "computed", "said"),
    [
        (lambda: PZOBO(4, mu=1e-2), FLOAT, None, None),
        (lambda: PZOBO(4, mu=1e-6), FLOAT, None, FLOAT),
        (lambda: PZOBO(4, mu=1e-6), DOUBLE, None, None),
        (lambda: PZOBO(4, mu=1e-2), FLOAT, BRAIN, BRAIN),
        (lambda: PZOBO(4, mu=1e-2), FLOAT, HALF, HALF),
        (lambda: PZOBO(4, mu=0.3), FLOAT, HALF, None),
        (lambda: PZOBO(4, mu=1e-2, chunk_size=1), FLOAT, BRAIN, BRAIN),
        (lambda: PZOBO(4, mu=1e-2), BRAIN, None, BRAIN),
        (lambda: ZerothOrder(4, mu=1e-2), FLOAT, None, None),
        (lambda: ZerothOrder(4, mu=1e-5), FLOAT, None, FLOAT),
        (lambda: ZerothOrder(4, mu=1e-5), DOUBLE, None, None),
        (lambda: ZerothOrder(4, mu=1e-2), FLOAT, BRAIN, BRAIN),
        (lambda: ZerothOrder(4, mu=1e-2), BRAIN, None, BRAIN),
        (lambda: ZerothOrder(4, mu=1.0), FLOAT, BRAIN, None),
    ],
)
def test_a_small_mu(
    strategy: Callable[[], Any], stored: torch.dtype, computed: torch.dtype | None, said: torch.dtype | None
) -> None:
    made = strategy()
    words = rf"^`{type(made).__name__}\(mu={made.mu}\)` is small for {said}: .* rounding\. Raise `mu` to .* or use"
    warns = nullcontext() if said is None else pytest.warns(UserWarning, match=words)
    autocast = torch.autocast("cpu", computed, enabled=computed is not None)
    with warns, autocast:
        by_hand(seeded(Cleaning), made, stored)


def test_a_loss_that_casts_by_itself_is_seen() -> None:
    class Casts(Cleaning):
        def inner_loss(self, batch: Any) -> Tensor:
            x, y, index = batch
            hidden = F.linear(x.bfloat16(), self.net[0].weight.bfloat16()).float().tanh()
            return (self.example_weights[index].sigmoid() * (self.net[2](hidden) - y).square().mean(1)).mean()

    with pytest.warns(UserWarning, match=r"^`PZOBO\(mu=0\.001\)` is small for torch\.bfloat16"):
        by_hand(seeded(Casts), PZOBO(2, mu=1e-3), FLOAT)


def test_the_advice_on_mu_leads_to_silence() -> None:
    """It is a lower bound where the differences are mostly rounding, so it may take more than one look."""
    mu = 0.02
    for _ in range(5):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            by_hand(seeded(Cleaning), PZOBO(4, mu=mu), BRAIN)
        if not caught:
            break
        advised = str(caught[0].message).split("Raise `mu` to ")[1].split(", or")[0]
        mu = 3 * mu if advised == "much more" else float(advised.removeprefix("about "))
    assert not caught
    assert 0.1 < mu < 5


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN])
def test_a_solution_that_does_not_move_at_all(dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match=r"moves by 0 times its rounding\. Raise `mu` to much more, or use float"):
        by_hand(seeded(Cleaning), PZOBO(2, mu=1e-12, chunk_size=1), dtype)


def test_a_solver_has_the_rounding_of_what_it_returns() -> None:
    module = RidgeBlackBox()
    hypergradient(module, PZOBO(2, mu=1e-6), module.episode())
    with pytest.warns(UserWarning, match=r"^`PZOBO\(mu=1e-16\)` is small for torch\.float64: .* much more"):
        hypergradient(module, PZOBO(2, mu=1e-16), module.episode())


@pytest.mark.parametrize("kind", [PZOBO, ZerothOrder])
def test_looking_changes_no_bit(kind: Any) -> None:
    unseeing = kind(3, mu=0.1)
    unseeing._looked = True
    found = [by_hand(seeded(Cleaning), strategy, FLOAT) for strategy in (kind(3, mu=0.1), unseeing)]
    assert torch.equal(*found)


def test_one_look_a_fit() -> None:
    strategy = PZOBO(2, mu=1e-6)
    module = seeded(Cleaning)
    with pytest.warns(UserWarning, match="is small") as caught:
        trainer(strategy, max_steps=3).fit(module, listed([EPISODE] * 3))
    assert len([each for each in caught if "is small" in str(each.message)]) == 1


def test_the_coarsest_dtype() -> None:
    with CoarsestDtype() as seen:
        assert seen.dtype is None
        torch.ones(2, dtype=torch.int64).sum()
        assert seen.dtype is None
        torch.ones(2, dtype=DOUBLE)
        assert seen.dtype == DOUBLE
        torch.ones(2, dtype=HALF).float().double()
        assert seen.dtype == HALF
        with torch.autocast("cpu", BRAIN):
            F.linear(torch.ones(2, 2), torch.ones(2, 2)).float()
    assert seen.dtype == BRAIN
