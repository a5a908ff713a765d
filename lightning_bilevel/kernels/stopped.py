"""What stops a gradient stops a tangent, too.

``torch.no_grad`` and its kin keep reverse mode out of a block, but not forward mode: one function, two
derivatives.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def no_grad_stops_tangents() -> Iterator[None]:
    """Push tangents as reverse mode would pull gradients: not through what runs without gradients inside.

    Covers ``torch.no_grad``, ``torch.set_grad_enabled(False)`` and what is built on them, as contexts, decorators and
    calls; ``torch.inference_mode``, ``detach()``, ``.data`` and ``.item()`` stop tangents by themselves. Gradients are
    enabled within, as they are where a graph is made, whatever they were outside. Only the calling thread is meant.

    What comes out may carry a graph of parameters that require gradients and that no tangent belongs to: detach it.
    """
    core: Any = torch._C
    native = core._set_grad_enabled  # all of PyTorch's contexts come here
    thread = threading.get_ident()
    stops: list[int] = []  # depths of the function transforms within which gradients were disabled

    def set_grad_enabled(mode: bool) -> None:
        native(mode)
        if threading.get_ident() != thread:
            return
        depth = _depth()
        if not mode:
            stops.append(depth)
        else:  # a transform that enables gradients for itself, as `torch.func.grad`, does not for those around it
            stops[:] = [stop for stop in stops if stop < depth]
        if not mode or not stops:
            core._set_fwd_grad_enabled(mode)

    with torch.enable_grad():
        forward = core._is_fwd_grad_enabled()
        core._set_grad_enabled = set_grad_enabled
        try:
            yield
        finally:
            core._set_grad_enabled = native
            core._set_fwd_grad_enabled(forward)


def _depth() -> int:
    """Return how many function transforms are active."""
    innermost = torch._C._functorch.peek_interpreter_stack()
    return innermost.level() if innermost is not None else 0
