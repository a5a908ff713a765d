"""Outside of a fit: a Trainer is lent to a module for the length of a call, and one that is missing is named."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_bilevel.errors import combination_error, value_error
from lightning_bilevel.host import LightningModule, Trainer
from lightning_bilevel.modules.examine import user_line

UNATTACHED = r"is not attached to a `Trainer`"
"""What Lightning says where a module reads ``self.trainer``, or what needs it, and none has it."""


@contextmanager
def attached(module: LightningModule, call: str, trainer: Any = None) -> Iterator[None]:
    """Lend a module a Trainer; say what to do where its hooks read one that it does not have.

    Args:
        module: the module; its submodules get the Trainer, too, and all have what they had afterwards.
        call: what the user has called.
        trainer: what is lent; ``None`` leaves all as it is.

    Raises:
        ValueError: ``trainer`` is no Trainer.
        MisconfigurationError: a hook reads ``self.trainer``, and there is none; names the line.

    >>> module, trainer = LightningModule(), Trainer(logger=False, max_epochs=5)
    >>> with attached(module, "hypergradient", trainer):
    ...     module.trainer.max_epochs
    5
    """
    if trainer is not None and not isinstance(trainer, Trainer):
        raise value_error(f"{call}(trainer=...)", "a `Trainer`", trainer)
    children = [child for child in module.modules() if isinstance(child, LightningModule)]
    before = [child._trainer for child in children]
    if trainer is not None:
        module.trainer = trainer
    try:
        yield
    except RuntimeError as error:
        if UNATTACHED not in str(error):
            raise
        where = user_line([(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)])
        raise combination_error(
            f"`{call}` with `{type(module).__name__}` outside of a fit",
            f"it reads `self.trainer`{f' ({where})' if where else ''}",
            "Call it in a hook of a fit, of `trainer.validate` or `trainer.test`"
            if call == "adapted"
            else f"Pass `{call}(..., trainer=trainer)`, which lends it one; within a fit, `StrategyAudit()` among the "
            "callbacks tries all strategies",
        ) from error
    finally:
        for child, own in zip(children, before, strict=True):
            child._trainer = own
