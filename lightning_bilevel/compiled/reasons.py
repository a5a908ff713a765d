"""Why something is not compiled."""

from __future__ import annotations


class NotCompiled(RuntimeError):
    """Why an inner step has to be eager; never reaches the user but as the words of a warning."""


def reason(error: BaseException) -> str:
    r"""Return the first line of what is behind an error.

    >>> reason(ValueError("It does not work.\nAt all."))
    'It does not work.'
    """
    while not isinstance(error, NotCompiled) and (behind := error.__cause__ or getattr(error, "inner_exception", None)):
        error = behind
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
