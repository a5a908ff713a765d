"""Is a difference mostly rounding? In which dtype something is computed, and what finite differences say of it."""

from __future__ import annotations

import math
import warnings
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from lightning_bilevel.problem import BilevelProblem


class CoarsestDtype(TorchFunctionMode):
    """Finds the floating dtype of least precision that anything is computed in while this context is active.

    Under autocast, losses and gradients are float32 tensors with the rounding of bfloat16 or float16: only the
    operations on the way tell. Looking costs some microseconds an operation and changes no result: it sees what a loss
    calls and not how PyTorch makes it, for in a ``TorchDispatchMode`` some tensor subclasses cannot be made.

    Attributes:
        dtype: the dtype; ``None`` before any floating operation.

    >>> with CoarsestDtype() as seen, torch.autocast("cpu", torch.bfloat16):
    ...     loss = (torch.ones(2, 2) @ torch.ones(2, 2)).float().sum()
    >>> loss.dtype, seen.dtype
    (torch.float32, torch.bfloat16)
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtype: torch.dtype | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and look at what it returns."""
        returned = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # a subclass is not asked
            for value in tree_iter(returned):
                # An empty one rounds nothing: PyTorch keeps sizes in some.
                if isinstance(value, Tensor) and value.dtype.is_floating_point and value.numel():
                    self.dtype = value.dtype if self.dtype is None else coarser(self.dtype, value.dtype)
        return returned


def coarsest_in(loss: Tensor) -> torch.dtype:
    """Return the floating dtype of least precision on the way to a loss, as far as its graph tells.

    :class:`CoarsestDtype` sees operations without a graph, too, but what is compiled never runs again after it has been
    in a dispatch mode.

    >>> weight = torch.ones(2, 2, requires_grad=True)
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     loss = (weight @ torch.ones(2, 2)).float().sum()
    >>> coarsest_in(loss)
    torch.bfloat16
    """
    found, seen, nodes = loss.dtype, set(), [loss.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found = reduce(coarser, _dtypes(node), found)
            nodes += [following for following, _ in node.next_functions]
    return found


def _dtypes(node: Any) -> list[torch.dtype]:
    """Return the floating dtypes that a node of a graph tells of: of its results, in torch 2.4 of what it has saved."""
    if hasattr(node, "_input_metadata"):
        told = list(node._input_metadata)
    else:
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        told = [each for each in saved if isinstance(each, Tensor)]
    return [each.dtype for each in told if each.dtype.is_floating_point]


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """Return the dtype with the larger rounding unit.

    >>> coarser(torch.float16, torch.bfloat16)
    torch.bfloat16
    """
    return b if torch.finfo(b).eps > torch.finfo(a).eps else a


def rounding_error(dtype: torch.dtype) -> float:
    """Return the relative error of rounding to nearest: at most ε/√12 at root mean square.

    >>> round(rounding_error(torch.bfloat16), 4)
    0.0023
    """
    return torch.finfo(dtype).eps / math.sqrt(12)


def first_look(problem: BilevelProblem, strategy: str, mu: float) -> bool:
    """Return whether this strategy's differences on this problem have not been compared with rounding yet.

    Checked once per problem: the comparison synchronizes with the device.
    """
    look = (strategy, mu, problem.inner_steps)
    seen = problem.findings.setdefault("rounding", set())
    first = look not in seen
    seen.add(look)
    return first


def look_at_differences(strategy: str, mu: float, value: Tensor, computed: torch.dtype | None) -> None:
    """Warn where differences of the outer loss over μ are mostly rounding: where μ² < ε h.

    Args:
        strategy: the class name.
        mu: μ.
        value: h.
        computed: the least precise dtype that anything was computed in, as :class:`CoarsestDtype` has seen.
    """
    dtype = value.dtype if computed is None else coarser(value.dtype, computed)
    rounding = torch.finfo(dtype).eps * abs(value.item())
    if mu**2 < rounding:
        reason = f"differences of an outer loss of {value.item():.3g} are mostly rounding"
        warn_of_rounding(strategy, mu, dtype, reason, f"about {math.sqrt(rounding):.1g}")


def warn_of_rounding(strategy: str, mu: float, dtype: torch.dtype, reason: str, enough: str) -> None:
    """Say that μ is too small for differences, and what to do.

    Args:
        strategy: the class name.
        mu: μ.
        dtype: what is computed in.
        reason: a clause, with a number.
        enough: the μ to raise it to.
    """
    finer = "float64" if dtype == torch.float32 else "float32 or float64"
    warnings.warn(
        f"`{strategy}(mu={mu})` is small for {dtype}: {reason}. Raise `mu` to {enough}, or use {finer}.",
        stacklevel=3,
    )
