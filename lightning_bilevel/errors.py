"""Errors in three wordings, a wrong value, an impossible combination, a missing hook, and checks of arguments.

An error made here keeps the reason and the fix apart from its message: the audit shows them in columns of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, get_args

T = TypeVar("T")


class _Explained(Exception):
    """An error whose reason and fix are to be had apart from its message.

    Args:
        message: the whole text.
        reason: what is wrong, as a clause.
        fix: the way out, as a sentence.
    """

    def __init__(self, message: str, reason: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.reason, self.fix = reason or message, fix


class MisconfigurationError(_Explained, RuntimeError):
    """Things that are fine by themselves do not work together, or something is missing."""


class ArgumentError(_Explained, ValueError):
    """A value is not what was expected."""


class NoLossError(ArgumentError):
    """A loss is ``None``: its batch is left out, as Lightning does it where a training step returns that."""


class NonfiniteError(_Explained, FloatingPointError):
    """A quantity became nan or infinite."""

    def with_note(self, note: str) -> NonfiniteError:
        """Return this error with a further sentence in its message."""
        return NonfiniteError(f"{self} {note}", self.reason, self.fix)


def value_error(what: str, expected: str, got: Any, hint: str = "") -> ArgumentError:
    """Say which value was expected and which one came.

    Args:
        what: the argument as the user writes it, such as ``ForwardGradient(num_directions=...)``.
        expected: what it has to be, such as ``a positive integer``.
        got: what came; shown by its ``repr``.
        hint: what to try, as a sentence.

    >>> value_error("SGD(lr=...)", "a non-negative number", -1)
    ArgumentError('Expected `SGD(lr=...)` to be a non-negative number, got -1.')
    """
    message = f"Expected `{what}` to be {expected}, got {got!r}"
    return ArgumentError(f"{message}. {hint}" if hint else f"{message}.", message, hint)


def no_loss_error(what: str, hint: str = "Is a `return` missing?") -> NoLossError:
    """Say which loss was ``None``.

    Args:
        what: the call that returned it.
        hint: what to do, as a sentence.

    >>> print(no_loss_error("Net.loss(batch)"))
    Expected `Net.loss(batch)` to be a loss tensor, or a mapping with one at 'loss', got None.
    Is a `return` missing? A fit skips such a step.
    """
    hint = f"{hint} A fit skips such a step."
    error = value_error(what, "a loss tensor, or a mapping with one at 'loss'", None, hint)
    return NoLossError(str(error), error.reason, error.fix)


def nonfinite_error(what: str, got: Any, hint: str) -> NonfiniteError:
    """Say which quantity became nan or infinite and what to try.

    >>> nonfinite_error("inner loss at step 3", float("nan"), "Lower the learning rate.")
    NonfiniteError('Expected the inner loss at step 3 to be finite, got nan. Lower the learning rate.')
    """
    return NonfiniteError(f"Expected the {what} to be finite, got {got}. {hint}", f"the {what} is {got}", hint)


def combination_error(what: str, because: str, instead: str) -> MisconfigurationError:
    """Say what cannot be combined, why, and what to use.

    Args:
        what: what was tried, such as ``two hypergradient strategies in one Trainer``.
        because: the reason, a clause without a full stop.
        instead: the way out, a sentence without a full stop.

    >>> print(combination_error("`FSLA` with `inner_steps=5`", "it takes one step", "Use `inner_steps=1`"))
    Cannot use `FSLA` with `inner_steps=5`. This is because it takes one step. Use `inner_steps=1`.
    """
    message = f"Cannot use {what}. This is because {because}. {instead}."
    return MisconfigurationError(message, f"{what}: {because}", f"{instead}.")


def missing_error(owner: str, what: str, fix: str) -> MisconfigurationError:
    """Name a missing hook or object and show the smallest fix.

    >>> missing_error("Net", "inner_loss", "Add `def inner_loss(self, batch): ...`")
    MisconfigurationError('`Net` has no inner_loss. Add `def inner_loss(self, batch): ...`.')
    """
    return MisconfigurationError(f"`{owner}` has no {what}. {fix}.", f"`{owner}` has no {what}", f"{fix}.")


def add_note(error: Exception, note: str) -> None:
    """Add a line to what a traceback shows; before Python 3.11, to the message.

    >>> add_note(error := ValueError("no"), "In the inner loss.")
    >>> "In the inner loss." in f"{error} {getattr(error, '__notes__', '')}"
    True
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])


def report(found: Sequence[MisconfigurationError]) -> MisconfigurationError:
    """Return one error for all that was found: a line for each, the same fix named once.

    >>> both = report([missing_error("Net", "a", "Add it"), missing_error("Net", "b", "Add it")])
    >>> both.reason, both.fix
    ('`Net` has no a; `Net` has no b', 'Add it.')
    """
    fixes = dict.fromkeys(error.fix for error in found if error.fix)
    return MisconfigurationError(
        "\n".join(map(str, found)), "; ".join(error.reason for error in found), " ".join(fixes)
    )


def refuse(found: Sequence[MisconfigurationError]) -> None:
    """Raise one report of all that was found, if anything was.

    Raises:
        MisconfigurationError: a line for each.
    """
    if found:
        raise report(found)


def of_an_instance(setup: Callable[..., None]) -> Callable[..., None]:
    """Let a callback's ``setup`` say so where the Trainer was given its class: Lightning calls it on the class then.

    >>> class Nothing:
    ...     @of_an_instance
    ...     def setup(self, trainer, pl_module, stage): pass
    >>> class Trainer:
    ...     callbacks = [Nothing]
    >>> Nothing.setup(Trainer(), None, stage="fit")
    Traceback (most recent call last):
    lightning_bilevel.errors.MisconfigurationError: Cannot use the class `Nothing` among the callbacks. This is because
    a Trainer takes instances. Write `callbacks=[Nothing()]`.
    """

    @wraps(setup)
    def called(self: Any, *args: Any, **kwargs: Any) -> None:
        classes = [each for each in getattr(self, "callbacks", ()) if isinstance(each, type)]
        if not classes:  # `self` is no Trainer
            return setup(self, *args, **kwargs)
        self.callbacks = [each for each in self.callbacks if each not in classes]  # nor is another hook called on one
        name = classes[0].__name__
        raise combination_error(
            f"the class `{name}` among the callbacks", "a Trainer takes instances", f"Write `callbacks=[{name}()]`"
        )

    return called


def integer(what: str, value: Any, least: int = 1) -> int:
    """Return ``value`` if it is an ``int`` of at least ``least``; raise the value error otherwise.

    >>> integer("TruncatedReverse(steps=...)", 3)
    3
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        words = {0: "a non-negative integer", 1: "a positive integer"}
        raise value_error(what, words.get(least, f"an integer of at least {least}"), value)
    return value


def number(
    what: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> float:
    """Return ``value`` if it is a finite number within the bounds; raise the value error otherwise.

    >>> number("Nystrom(rho=...)", 0.5, above=0)
    0.5
    """
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    low = above is not None and (not real or value <= above) or at_least is not None and (not real or value < at_least)
    if not real or low or (at_most is not None and value > at_most):
        raise value_error(what, _numbers(above, at_least, at_most), value)
    return float(value)


def flag(what: str, value: Any) -> bool:
    """Return ``value`` if it is a ``bool``; raise the value error otherwise.

    >>> flag("ForwardUnroll(warm_start=...)", True)
    True
    """
    if not isinstance(value, bool):
        raise value_error(what, "True or False", value)
    return value


def one_of(what: str, kind: Any, value: T) -> T:
    """Return ``value`` if it is among those of the ``Literal`` type ``kind``; raise the value error otherwise.

    >>> from typing import Literal
    >>> one_of("ZerothOrder(scheme=...)", Literal["forward", "central"], "central")
    'central'
    """
    if value not in get_args(kind):
        raise value_error(what, " or ".join(repr(name) for name in get_args(kind)), value)
    return value


def _numbers(above: float | None, at_least: float | None, at_most: float | None) -> str:
    if at_most is not None:
        low = f"({above}" if above is not None else f"[{at_least}" if at_least is not None else "(-inf"
        return f"a number in {low}, {at_most}]"
    if above is not None:
        return "a positive number" if above == 0 else f"a number above {above}"
    if at_least is not None:
        return "a non-negative number" if at_least == 0 else f"a number of at least {at_least}"
    return "a finite number"
