"""What autograd writes and nothing needs: factors of one, powers of zero and one, tensors filled with a number.

Inductor finds most of it too, but only after it has traced and lowered each operation, which is where compiling takes
its time. A gradient starts from ``ones_like(loss)``, so that a backward graph would compute the loss again for nothing
but its shape.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

_ATEN = torch.ops.aten
MULTIPLIES = (_ATEN.mul.Tensor, _ATEN.mul.Scalar)
DIVIDES = (_ATEN.div.Tensor, _ATEN.div.Scalar)
_FILLED = {
    _ATEN.ones_like.default: 1.0, _ATEN.ones.default: 1.0, _ATEN.new_ones.default: 1.0,
    _ATEN.zeros_like.default: 0.0, _ATEN.zeros.default: 0.0, _ATEN.new_zeros.default: 0.0,
}  # fmt: skip
_REARRANGE = (
    _ATEN.expand.default, _ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default, _ATEN.clone.default,
    _ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default, _ATEN.unsqueeze.default, _ATEN.squeeze.dim,
    _ATEN.select.int, _ATEN.slice.Tensor,
)  # fmt: skip
_NEUTRAL = {
    **dict.fromkeys((*MULTIPLIES, *DIVIDES, _ATEN.pow.Tensor_Scalar), 1.0),
    **dict.fromkeys((_ATEN.add.Tensor, _ATEN.sub.Tensor), 0.0),
}


def simplified(graph: fx.GraphModule) -> fx.GraphModule:
    """Leave out of a graph what does nothing.

    >>> from lightning_bilevel.compiled.graphs import trace
    >>> def penalty(args):
    ...     (w,) = args
    ...     w = w.detach().requires_grad_()
    ...     return list(torch.autograd.grad(0.1 * w.square().sum(), w))
    >>> graph = simplified(trace(penalty, [torch.ones(2)]).graph)
    >>> [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    ['aten.mul.Tensor']
    """
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not isinstance(value := node.meta.get("val"), Tensor):
            continue
        number = filled(node)
        if number is not None and node.all_input_nodes:
            _fill(graph, node, value, number)
        elif (same := _same(node)) is not None:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
        else:
            _collect(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def filled(arg: Any) -> float | None:
    """Return the number that an argument is, or that it is filled with; ``None`` where that is not known."""
    if isinstance(arg, (int, float)) and not isinstance(arg, bool):
        return float(arg)
    value = arg.meta.get("val") if isinstance(arg, fx.Node) else None
    if not isinstance(value, Tensor) or not value.is_floating_point() or arg.op != "call_function":
        return None
    if arg.target in _FILLED:
        return _FILLED[arg.target]
    if arg.target in (_ATEN.full.default, _ATEN.full_like.default):
        return filled(arg.args[1])
    if arg.target in _REARRANGE:
        return filled(arg.args[0])
    if arg.target is _ATEN.pow.Tensor_Scalar and arg.args[1] == 0:
        return 1.0
    if arg.target in (*MULTIPLIES, *DIVIDES) and not arg.kwargs:
        if (first := filled(arg.args[0])) is None or (second := filled(arg.args[1])) is None:
            return None
        if arg.target in DIVIDES and second == 0:
            return None
        return first * second if arg.target in MULTIPLIES else first / second
    return None


def _fill(graph: fx.GraphModule, node: fx.Node, value: Tensor, number: float) -> None:
    """Write a tensor that is filled with a number, whatever it was made from."""
    with graph.graph.inserting_before(node):
        kwargs: Any = {"dtype": value.dtype, "device": value.device}
        full = graph.graph.call_function(_ATEN.full.default, (list(value.shape), number), kwargs)
    full.meta["val"] = value
    node.replace_all_uses_with(full)
    graph.graph.erase_node(node)


def _same(node: fx.Node) -> fx.Node | None:
    """Return what a node is the same as."""
    of = node.args[0] if node.args else None
    if not isinstance(of, fx.Node):
        return None
    if node.target is _ATEN.t.default and of.target is _ATEN.t.default:
        return of.args[0]  # type: ignore[return-value]
    if len(node.args) != 2 or node.kwargs:
        return None
    target: Any = node.target
    swaps = target in (*MULTIPLIES, _ATEN.add.Tensor)
    for value, other in (node.args, node.args[::-1])[: 2 if swaps else 1]:
        if _fits(value, node) and filled(other) == _NEUTRAL.get(target, math.nan):
            return value  # type: ignore[return-value]
    return None


def _collect(node: fx.Node) -> None:
    """Write a multiple with its number, not with a tensor of it, and a multiple of a multiple with one number."""
    if node.target not in (*MULTIPLIES, *DIVIDES) or node.kwargs:
        return
    args: Any = tuple(_number(arg, node) for arg in node.args)
    if any(_fits(arg, node) for arg in args):
        node.args = args
    for value, factor in (args, args[::-1])[: 1 if node.target in DIVIDES else 2]:
        if not _fits(value, node) or (number := filled(factor)) is None:
            continue
        if node.target in MULTIPLIES and _is_scaled(value):
            value, inner = value.args
            number *= inner
        node.target = DIVIDES[0] if node.target in DIVIDES else MULTIPLIES[0]
        node.args = value, number
        return


def _number(arg: Any, node: fx.Node) -> Any:
    """Return a number of the graph that an argument repeats, and other arguments as they are."""
    if not isinstance(arg, fx.Node) or arg.target is not _ATEN.expand.default:
        return arg
    (number, *_), result = arg.args, node.meta["val"]
    value = number.meta["val"]  # type: ignore[union-attr]
    return number if value.ndim == 0 and value.dtype == result.dtype else arg


def _is_scaled(node: fx.Node) -> bool:
    """Return whether a node is a tensor times a number, and needed here alone."""
    return node.target is _ATEN.mul.Tensor and isinstance(node.args[1], float) and len(node.users) == 1


def _fits(arg: Any, node: fx.Node) -> bool:
    """Return whether an argument is a real tensor of the shape and type of the result."""
    value, result = arg.meta.get("val") if isinstance(arg, fx.Node) else None, node.meta["val"]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return value.shape == result.shape and value.dtype == result.dtype
