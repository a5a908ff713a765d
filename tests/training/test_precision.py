"""What a fit says about the precision of its Trainer, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_bilevel import ReverseUnroll
from lightning_bilevel.training.precision import warn_of_precision
from tests.support.modules import trainer
from tests.support.precisions import Cleaning, by_hand, error, fitted, half
from tests.support.seeds import seeded


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
