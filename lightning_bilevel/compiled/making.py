"""How every graph is made: draws are put back, eager is compared, and what failed, or how long it took, is said."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from lightning_bilevel.compiled.reasons import NotCompiled, reason
from lightning_bilevel.compiled.watch import drawn_beside_torch
from lightning_bilevel.host import rank_zero_info
from lightning_bilevel.modules.functional import FunctionalModule

Made = TypeVar("Made")


def made_once(
    functional: FunctionalModule, make: Callable[[], Made], check: Callable[[Made], None], what: str, how: str
) -> Made:
    """Return what ``make`` does, and say how long it took.

    Args:
        functional: the module; all its generators stand afterwards where they did before.
        make: traces and compiles.
        check: raises unless the result computes what eager does.
        what: is made, in words.
        how: it is made, in words.

    Raises:
        NotCompiled: it cannot be traced or compiled, draws from elsewhere than torch, or computes something else.
    """
    began, before = time.perf_counter(), functional.snapshot()
    with before.fork():
        try:
            made = make()
        except NotCompiled:
            raise
        except Exception as error:  # torch's, of many kinds
            raise NotCompiled(reason(error)) from error
        if drawn_beside_torch(functional, before):
            raise NotCompiled("it draws from NumPy, `random` or a generator of its own")
        check(made)
    took, kind = time.perf_counter() - began, type(functional.module).__name__
    rank_zero_info(f"Compiled {what} of `{kind}` ({how}) in {took:.1f} s.")
    return made
