"""The first look at a module's losses: what their graphs say before anything is estimated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function as autograd_function

PACKAGE = Path(__file__).parents[1]
_TORCH = Path(torch.__file__).parent


def once_differentiable(loss: Tensor) -> list[tuple[str, str]]:
    """Return name and line of every ``autograd.Function`` in a graph that is marked ``once_differentiable``.

    Their second derivative is an error in PyTorch only where *all* leaves are asked for: ``torch.autograd.grad`` with
    ``inputs`` never reaches the node that would raise, and leaves their part out without a word.

    Args:
        loss: the end of a graph; recorded under anomaly mode, else the lines are empty.
    """
    found: dict[type, tuple[str, str]] = {}
    for node in _nodes(loss):
        kind: Any = getattr(node, "_forward_cls", None)
        code = getattr(getattr(kind, "backward", None), "__code__", None)
        if code is not None and code.co_filename == autograd_function.__file__ and code.co_name == "wrapper":
            found[kind] = kind.__name__, user_line(frames_in("".join(node.metadata.get("traceback_", []))))
    return list(found.values())


def frames_in(text: str) -> list[tuple[str, int | None]]:
    """Return file and line of every frame in the text of a traceback."""
    return [(name, int(line)) for name, line in re.findall(r'File "([^"]+)", line (\d+)', text)]


def user_line(frames: list[tuple[str, int | None]]) -> str:
    """Return the user's line: the deepest one below this package's frames that is not PyTorch's."""
    inside = [number for number, (name, _) in enumerate(frames) if PACKAGE in Path(name).parents]
    if not inside:
        return ""
    for name, line in reversed(frames[inside[-1] + 1 :]):
        path = Path(name)
        if _TORCH not in path.parents and not name.startswith("<") and "torchinductor" not in name:
            return f"{path.name}:{line}"
    return ""


def _nodes(loss: Tensor) -> Iterator[Any]:
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack += [following for following, _ in node.next_functions]
