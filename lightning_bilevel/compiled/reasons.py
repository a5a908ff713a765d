"""Why something is not compiled."""

from __future__ import annotations

import re
from typing import Literal

from lightning_bilevel.host import rank_zero_warn


class NotCompiled(RuntimeError):
    """Why an inner step has to be eager; never reaches the user but as the words of a warning."""


def reason(error: BaseException) -> str:
    r"""Return the first line of what is behind an error.

    >>> reason(ValueError("It does not work.\nAt all."))
    'It does not work.'
    """
    while not isinstance(error, NotCompiled) and (behind := error.__cause__ or getattr(error, "inner_exception", None)):
        error = behind
    if re.search(r"['(]Later[')]", str(error)):  # which stands for that
        return "it computes with what a metric says or has counted"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


What = Literal["steps", "gradients", "products", "outer"]

_WORDS: dict[What, str] = {
    "steps": "inner steps",
    "gradients": "gradients of the inner loss",
    "products": "products with second derivatives",
    "outer": "outer losses",
}


class Refusals:
    """What is not compiled any more, and what was said about that."""

    def __init__(self) -> None:
        self._refused: set[What] = set()
        self._said: set[str] = set()

    def holds(self, what: What) -> bool:
        """Return whether something is eager from now on; without steps, so is all of the inner loss."""
        return what in self._refused or ("steps" in self._refused and what != "outer")

    def refuse(self, what: What, error: NotCompiled) -> None:
        """Leave something eager, and say why."""
        self._refused.add(what)
        self.say(what, error)

    def say(self, what: What, error: NotCompiled) -> None:
        """Say once why something is eager."""
        if str(error) not in self._said:
            self._said.add(str(error))
            rank_zero_warn(
                f"The {_WORDS[what]} are not compiled: {error}. They are computed as without `compile=True`."
            )
