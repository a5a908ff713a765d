"""Every strategy in every precision of the Trainer."""

from __future__ import annotations

import pytest
import torch

from lightning_bilevel import SOBA, FirstOrder, HypergradientStrategy
from tests.support.precisions import by_hand, error, fitted, half, made
from tests.support.problems import Problem
from tests.support.tables import ROWS, Row

DIFFERENCES = {name: row for name, row in ROWS.items() if hasattr(row.strategy, "mu")}
DERIVATIVES = {name: row for name, row in ROWS.items() if name not in DIFFERENCES and not row.differences}

every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
every_derivative = pytest.mark.parametrize("row", DERIVATIVES.values(), ids=DERIVATIVES)
every_difference = pytest.mark.parametrize("row", DIFFERENCES.values(), ids=DIFFERENCES)
expected_words = pytest.mark.filterwarnings("ignore:With `Trainer.precision", "ignore:`(PES|PZOBO|ZerothOrder)")


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
    assert torch.equal(found, expected) == isinstance(strategy, (FirstOrder, SOBA))  # float32 here: f by φ


def with_larger_mu(row: Row) -> tuple[Problem, HypergradientStrategy]:
    module, strategy = made(row)
    for each in (strategy, *strategy.members().values()):
        each.mu = 0.3
    return module, strategy


@every_difference
def test_bf16_mixed_differences_want_a_larger_mu(row: Row) -> None:
    module, strategy = made(row)
    with pytest.warns(UserWarning, match=r"^`(PES|PZOBO|ZerothOrder)\(mu=0\.001\)` is small for torch\.bfloat16"):
        wrong = fitted(module, strategy, precision="bf16-mixed")
    expected = by_hand(*made(row), torch.float32)
    assert error(wrong, expected) > 0.1
    module, strategy = with_larger_mu(row)
    right = fitted(module, strategy, precision="bf16-mixed")
    module, strategy = with_larger_mu(row)
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
