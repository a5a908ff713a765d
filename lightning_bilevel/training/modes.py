"""The mode, training or evaluation, in which ``adapted`` takes its inner steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from torch import nn

from lightning_bilevel.host import rank_zero_warn

Mode = Literal["train", "eval"] | None


def modes_of(module: nn.Module) -> dict[str, bool]:
    """Return whether each submodule is in training mode.

    >>> modes_of(nn.Sequential(nn.Dropout()).eval())
    {'': False, '0': False}
    """
    return {name: child.training for name, child in module.named_modules()}


@contextmanager
def in_mode(module: nn.Module, mode: Mode, known: Mapping[str, bool]) -> Iterator[bool]:
    """Put a module into the mode of inner steps, and back.

    Args:
        module: all of it.
        mode: ``"train"`` is that of ``known``, where it is known. ``None`` changes nothing.
        known: :func:`modes_of` the module in a fit, where parts of it may be in evaluation mode (a frozen backbone).

    Yields:
        Whether anything is in another mode than before.
    """
    before = modes_of(module)
    try:
        if mode is not None:
            module.train(mode == "train")
        if mode == "train" and known.keys() == before.keys():
            _set(module, known)
        if mode != "train" and (name := _fixed_statistics(module, known)):
            rank_zero_warn(
                f"`adapted` takes its inner steps in evaluation mode, where `{name}` normalizes by its running "
                "statistics, not by those of the batches, as the inner steps of a fit do: such steps may lead nowhere. "
                "`adapted(batches, mode='train')`, the default, takes them as the fit does."
            )
        yield modes_of(module) != before
    finally:
        _set(module, before)


def _set(module: nn.Module, modes: Mapping[str, bool]) -> None:
    for name, child in module.named_modules():
        child.training = modes.get(name, child.training)


def _fixed_statistics(module: nn.Module, known: Mapping[str, bool]) -> str:
    """Return the name of the first norm that uses its running statistics, and not by the modes that are known."""
    for name, child in module.named_modules():
        if getattr(child, "running_mean", None) is not None and not child.training and known.get(name, True):
            return name
    return ""
