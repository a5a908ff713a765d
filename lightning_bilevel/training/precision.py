"""What a Trainer's precision does to hypergradients, said before the first batch."""

from __future__ import annotations

from lightning_bilevel.host import Trainer, rank_zero_warn

_SOUND = "Use `Trainer(precision='bf16-mixed')` or '32-true'."
_WARNINGS = {
    "16-mixed": (
        "the gradient scaler multiplies the outer loss only. Inner gradients are computed in float16 as they are, and "
        "what is below 6e-8 in them becomes zero."
    ),
    "16-true": (
        "nothing scales gradients, so that what is below 6e-8 in them becomes zero, sums of squares overflow at 65504, "
        "and the `eps=1e-8` of Adam is zero (0/0 where a gradient is zero)."
    ),
    "bf16-true": (
        "parameters keep 8 bits: inner and outer steps that change a number by less than 0.2% are lost, and so are "
        "the differences of `PZOBO` and `ZerothOrder` unless `mu` is large."
    ),
}
"""What is wrong, for a hypergradient, with precisions that Lightning offers."""


def warn_of_precision(trainer: Trainer) -> None:
    """Say what the Trainer's precision does to hypergradients, where that is more than rounding.

    '32-true', '64-true' and 'bf16-mixed' need no word. On a CPU, Lightning turns '16-mixed' into 'bf16-mixed'.
    """
    precision = trainer.precision
    if precision in _WARNINGS:
        rank_zero_warn(f"With `Trainer(precision='{precision}')` {_WARNINGS[precision]} {_SOUND}")
