"""From an error that came out of autograd or ``torch.func`` to the operation, the user's line, and a way out.

PyTorch names what it cannot do in many wordings, and where a backward pass fails the traceback ends inside of its
engine. The table below knows the wordings; anomaly mode knows the line that recorded the failing node.
"""

from __future__ import annotations

import re
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import function as autograd_function

from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.modules.examine import PACKAGE, frames_in, user_line
from lightning_bilevel.training.attachment import UNATTACHED


class Diagnosis(NamedTuple):
    """Why something does not work.

    Attributes:
        operation: the operation, as a user knows it: ``cdist``, ``torch.compile``; empty where unknown.
        where: ``file.py:line`` of the user's call of it; empty where unknown.
        reason: a clause.
        fix: what to change in the losses; a sentence, or empty.
    """

    operation: str
    where: str
    reason: str
    fix: str


class _Known(NamedTuple):
    """One wording of PyTorch's.

    Attributes:
        pattern: found in the message; its group, if it has one, names the operation.
        operation: the name where the message has none; empty asks the autograd graph.
        reason: with ``{}`` for the operation.
        fix: with ``{}`` for the operation.
    """

    pattern: str
    operation: str
    reason: str
    fix: str


_WITHOUT_TRANSFORMS = "Loop instead of vectorizing, or stay with double backward."

_KNOWN = [
    _Known(
        r"derivative for '?(?:aten::)?(\w+)'? is not implemented",
        "",
        "`{}` has no second derivative",
        "Write `{}` with elementary operations, or use a strategy without second derivatives.",
    ),
    _Known(
        r"torch\.compile.*double backward",
        "torch.compile",
        "a compiled function has no second derivative",
        "Leave the losses uncompiled, or use a strategy without second derivatives.",
    ),
    _Known(
        r"differentiate twice a function that was marked",
        "",
        "`{}` is marked `once_differentiable`",
        "Write its `backward` with differentiable operations and drop the mark.",
    ),
    _Known(
        r"forward AD with (\w+) that does not support it",
        "",
        "`{}` has no forward-mode derivative",
        "Write `{}` with elementary operations.",
    ),
    _Known(
        r"ZeroTensors are immutable",
        "",
        "PyTorch's forward mode fails in the backward pass of `{}`",
        "Write `{}` with elementary operations, such as `(a - b).square().mean()`.",
    ),
    _Known(
        r"modified by an inplace operation.*output \d+ of (\w+)",
        "",
        "what `{}` keeps for its backward pass is changed in place",
        "Write the operation after `{}` out of place: `x = x * 2` for `x.mul_(2)`.",
    ),
    _Known(
        r"autograd\.Function with functorch transforms|must implement the (?:vmap|jvp) staticmethod|vmap.*autograd\."
        r"Function",
        "",
        "`{}` is an `autograd.Function` that function transforms cannot enter",
        "Give it `setup_context` and `generate_vmap_rule = True`, or loop.",
    ),
    _Known(
        r"use_reentrant=True.*incompatible",
        "torch.utils.checkpoint",
        "`{}` with `use_reentrant=True` takes gradients of its own",
        "Pass `use_reentrant=False`.",
    ),
    _Known(
        r"don't yet support saved tensor hooks|escaped from inside a function being vmapped",
        "saved_tensors_hooks",
        "`{}` does not work inside function transforms",
        _WITHOUT_TRANSFORMS,
    ),
    _Known(
        r"Batching rule not implemented for aten::(\w+)",
        "",
        "`{}` cannot be vectorized",
        _WITHOUT_TRANSFORMS,
    ),
    _Known(
        r"vmap: It looks like you're calling \.item\(\)|data-dependent control flow",
        ".item()",
        "Python looks at the value of a tensor, which has many values where it is vectorized",
        "Use `torch.where` for `if`, or loop.",
    ),
    _Known(
        r"vmap: (?:aten::)?(\w+?)\(self, \*extra_args\) is not possible",
        "",
        "`{}` changes in place a tensor that is not vectorized",
        "Write it out of place, or loop.",
    ),
    _Known(
        r"does not require grad and does not have a grad_fn",
        "",
        "a loss carries no gradient",
        "Look for `detach`, `argmax`, `round`, `.item()` or `no_grad` on its way.",
    ),
    _Known(
        UNATTACHED,
        "self.trainer",
        "`{}` is read, and the module is in no fit",
        "Put `StrategyAudit()` among the callbacks of the fit, which audits its first batch, or lend the module a "
        "Trainer: `audit(..., trainer=trainer)`.",
    ),
    _Known(r"out of memory", "", "memory ran out", "Use smaller batches, `chunk_size` or `checkpoint='sqrt'`."),
]
"""What PyTorch says, and what it means here. The first that fits counts."""

_CHECKPOINT = str(Path(torch.__file__).parent / "utils" / "checkpoint.py")


def diagnose(error: Exception, again: Callable[[], object]) -> Diagnosis:
    """Return the operation behind an error, the user's line, the reason and a fix.

    Args:
        error: what was raised, with its traceback.
        again: raises it once more; called under anomaly mode where the traceback does not reach the user's line.
    """
    message = str(error)
    if isinstance(error, (MisconfigurationError, ValueError, FloatingPointError)) and _raised_by(error, PACKAGE):
        reason, fix = explained(error)
        if not isinstance(error, FloatingPointError):
            return Diagnosis("", "", reason, fix)
        operation, where = _recorded(again, check_nan=True)
        origin = f", which the backward pass of `{operation}` gave first" if operation else ""
        return Diagnosis(operation, where, f"{reason}{origin}", fix)
    known, operation = _look_up(message)
    where = user_line([(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)])
    if known is None:
        first = message.strip().splitlines()[0] if message.strip() else "no message"
        return Diagnosis(
            "", where, f"{type(error).__name__}: {first}", "Look at this line of the losses." if where else ""
        )
    operation = operation or known.operation
    if not operation or not where:
        node, recorded = _recorded(again)
        operation, where = operation or _python_function(error) or node, where or recorded
    if operation in ("saved_tensors_hooks", "CheckpointFunction") and _passed(error, _CHECKPOINT):
        operation = "torch.utils.checkpoint"
    name = operation or "an operation"
    return Diagnosis(operation, where, known.reason.format(name), known.fix.format(name))


def explained(error: Exception) -> tuple[str, str]:
    """Return reason and fix of an error of this package's own."""
    return getattr(error, "reason", str(error)), getattr(error, "fix", "")


def _look_up(message: str) -> tuple[_Known | None, str]:
    for known in _KNOWN:
        found = re.search(known.pattern, message, re.DOTALL)
        if found:
            return known, _plain(found[1]) if found.re.groups and found[1] else ""
    return None, ""


def _plain(name: str) -> str:
    """Return the name of an operation from that of its kernel or node.

    >>> _plain("_cdist_backward"), _plain("MseLossBackward0"), _plain("torch::autograd::NotImplemented")
    ('cdist', 'mse_loss', '')
    """
    if "CompiledFunction" in name:
        return "torch.compile"
    if "::" in name:
        return ""
    if name != name.lower():
        name = re.sub(r"(?:Backward)+\d*$", "", name)
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return re.sub(r"_(?:backward|forward)$", "", name).strip("_")


def _recorded(again: Callable[[], object], check_nan: bool = False) -> tuple[str, str]:
    """Return operation and line that anomaly mode names when the error comes once more."""
    with warnings.catch_warnings(record=True) as caught, torch.autograd.set_detect_anomaly(True, check_nan=check_nan):
        warnings.simplefilter("always")
        try:
            again()
        except Exception:
            pass
    node, where = "", ""
    # The last one is the forward call at the root: "Previous calculation was induced by" follows "Error detected in".
    for warning in caught:
        text = str(warning.message)
        named = re.search(r"(?:Error detected in|induced by) ([\w:]+)\.", text)
        if named:
            node, where = _plain(named[1]) or node, user_line(frames_in(text)) or where
    return node, where


def _python_function(error: Exception) -> str:
    """Return the name of the ``autograd.Function`` whose ``apply`` raised."""
    for frame in reversed(_stack(error)):
        if frame.f_code.co_name == "apply" and frame.f_code.co_filename == autograd_function.__file__:
            return getattr(frame.f_locals.get("cls"), "__name__", "")
    return ""


def _passed(error: Exception, filename: str) -> bool:
    return any(frame.f_code.co_filename == filename for frame in _stack(error))


def _raised_by(error: Exception, folder: Path) -> bool:
    frames = _stack(error)
    return bool(frames) and folder in Path(frames[-1].f_code.co_filename).parents


def _stack(error: Exception) -> list[types.FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
