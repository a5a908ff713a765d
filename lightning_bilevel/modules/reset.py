"""Which submodules can draw fresh values of their parameters, for ``inner_start="reinit"``."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

from torch import nn

from lightning_bilevel.errors import MisconfigurationError, missing_error


def reset_methods(module: nn.Module, names: Set[str]) -> Iterator[tuple[nn.Module, set[str], Any]]:
    """Yield each submodule that has some of these parameters itself, which, and its reset method or ``None``.

    >>> net = nn.Sequential(nn.Linear(1, 1), nn.PReLU())
    >>> [(type(child).__name__, sorted(own)) for child, own, _ in reset_methods(net, {"0.weight", "1.weight"})]
    [('Linear', ['0.weight']), ('PReLU', ['1.weight'])]
    """
    for prefix, child in module.named_modules():
        own = names & {f"{prefix}.{name}" if prefix else name for name in child._parameters}
        if own:
            yield child, set(own), getattr(child, "reset_parameters", None) or getattr(child, "_reset_parameters", None)


def check_all_drawn(module: nn.Module, names: Set[str], chosen: Set[str]) -> None:
    """Raise unless each of the parameters has a reset method, or is among those that the user's hook has chosen.

    Raises:
        MisconfigurationError: names the submodule and the parameters.
    """
    for child, own, reset in reset_methods(module, names):
        if reset is None and own - chosen:
            raise _undrawn(child, own)


def _undrawn(child: nn.Module, names: set[str]) -> MisconfigurationError:
    return missing_error(
        type(child).__name__,
        f"`reset_parameters()`, which `inner_start='reinit'` calls for {sorted(names)}",
        "Define it, or return these from `initial_inner_parameters()`",
    )
