"""The three wordings of this library's errors: a wrong value, an impossible combination, a missing hook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class MisconfigurationError(RuntimeError):
    """Things that are fine by themselves do not work together, or something is missing."""


def value_error(what: str, expected: str, got: Any, hint: str = "") -> ValueError:
    """Say which value was expected and which one came.

    Args:
        what: the argument as the user writes it, such as ``ForwardGradient(num_directions=...)``.
        expected: what it has to be, such as ``a positive integer``.
        got: what came; shown by its ``repr``.
        hint: what to try, as a sentence.

    >>> value_error("SGD(lr=...)", "a non-negative number", -1)
    ValueError('Expected `SGD(lr=...)` to be a non-negative number, got -1.')
    """
    return ValueError(_sentence(f"Expected `{what}` to be {expected}, got {got!r}.", hint))


def nonfinite_error(what: str, got: Any, hint: str) -> FloatingPointError:
    """Say which quantity became nan or infinite and what to try.

    >>> nonfinite_error("inner loss at step 3", float("nan"), "Lower the learning rate.")
    FloatingPointError('Expected the inner loss at step 3 to be finite, got nan. Lower the learning rate.')
    """
    return FloatingPointError(_sentence(f"Expected the {what} to be finite, got {got}.", hint))


def combination_error(what: str, because: str, instead: str) -> MisconfigurationError:
    """Say what cannot be combined, why, and what to use.

    Args:
        what: what was tried, such as ``two hypergradient strategies in one Trainer``.
        because: the reason, a clause without a full stop.
        instead: the way out, a sentence without a full stop.

    >>> print(combination_error("`FSLA` with `inner_steps=5`", "it takes one step", "Use `inner_steps=1`"))
    Cannot use `FSLA` with `inner_steps=5`. This is because it takes one step. Use `inner_steps=1`.
    """
    return MisconfigurationError(f"Cannot use {what}. This is because {because}. {instead}.")


def missing_error(owner: str, what: str, fix: str) -> MisconfigurationError:
    """Name a missing hook or object and show the smallest fix.

    >>> missing_error("Net", "inner_loss", "Add `def inner_loss(self, batch): ...`")
    MisconfigurationError('`Net` has no inner_loss. Add `def inner_loss(self, batch): ...`.')
    """
    return MisconfigurationError(f"`{owner}` has no {what}. {fix}.")


def refuse(found: Sequence[MisconfigurationError]) -> None:
    """Raise one report of all that was found, if anything was.

    Raises:
        MisconfigurationError: a line for each.
    """
    if found:
        raise MisconfigurationError("\n".join(map(str, found)))


def positive_integer(what: str, value: Any) -> int:
    """Return ``value`` if it is a positive ``int``; raise the value error otherwise.

    >>> positive_integer("TruncatedReverse(steps=...)", 3)
    3
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise value_error(what, "a positive integer", value)
    return value


def _sentence(message: str, hint: str) -> str:
    return f"{message} {hint}" if hint else message
