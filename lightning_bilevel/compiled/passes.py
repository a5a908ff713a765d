"""What is done to a flat graph: made right, or fast, where Inductor is not, and cut into forward and backward."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from lightning_bilevel.compiled.terms import Matrix, Multiple, Sum, call, term

_ATEN = torch.ops.aten
HEAVY = {
    "mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "native_batch_norm",
    "native_batch_norm_backward", "native_layer_norm", "native_layer_norm_backward", "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional", "_log_softmax", "_softmax",
}  # fmt: skip
"""What a backward graph is given rather than computes again."""

LARGE = 2**16
"""Numbers of a tensor that is written to memory and read again rather than kept in a cache."""


def without_alpha(graph: fx.GraphModule) -> fx.GraphModule:
    """Write a + s·b for add(a, b, alpha=s): Inductor drops the s where b, or a, is a matrix product (PyTorch 2.13)."""
    for node in list(graph.graph.nodes):
        if node.target in (_ATEN.add.Tensor, _ATEN.sub.Tensor) and node.kwargs.get("alpha", 1) != 1:
            with graph.graph.inserting_before(node):
                scaled = call(graph, _ATEN.mul.Tensor, [node.args[1], node.kwargs["alpha"]])
            node.update_arg(1, scaled)
            node.kwargs = {}
    graph.recompile()
    return graph


def as_in_memory(graph: fx.GraphModule) -> fx.GraphModule:
    """Let masks of what is permuted be drawn in the order of memory, as in place they are, and out of place not.

    Dropout in the layers of a transformer, which permute what attention returns.
    """
    for node in list(graph.graph.nodes):
        if node.target is not _ATEN.bernoulli_.float:
            continue
        mask, value = node.args[0], node.args[0].meta["val"]
        order = sorted(range(value.ndim), key=value.stride().__getitem__, reverse=True)
        if value.is_contiguous() or not value.permute(order).is_contiguous():
            continue
        with graph.graph.inserting_before(node):
            dense = graph.graph.call_function(_ATEN.permute.default, (mask, order))
            graph.graph.call_function(_ATEN.bernoulli_.float, (dense, *node.args[1:]), node.kwargs)
        node.replace_all_uses_with(mask)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def by_rows(graph: fx.GraphModule) -> fx.GraphModule:
    """Compute what is pointwise in a stack of large rows row by row, and stack the results.

    Then Inductor fuses what makes a row with what follows, and no stack is written that is read again: the tangents of
    a perceptron's weights in half the time.
    """
    for node in list(graph.graph.nodes):
        count = _rows_of(node)
        if not count:
            continue
        with graph.graph.inserting_before(node):
            rows = [call(graph, node.target, [_row(graph, arg, node, i) for arg in node.args]) for i in range(count)]
            stack = call(graph, _ATEN.stack.default, [rows])
        node.replace_all_uses_with(stack)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def apart(graph: fx.GraphModule) -> fx.GraphModule:
    """Write x − (−AB) for x + AB where these are large: Inductor leaves the sum to the product, which copies x first.

    The sum is the same, bit by bit, and is fused with what comes before and after.
    """
    for node in list(graph.graph.nodes):
        if node.target is not _ATEN.add.Tensor or node.kwargs or not all(_is_large(arg, node) for arg in node.args):
            continue
        for product, other in (node.args, node.args[::-1]):
            if _is_product(product):
                with graph.graph.inserting_before(node):
                    negative = call(graph, _ATEN.neg.default, [product])
                node.target, node.args = _ATEN.sub.Tensor, (other, negative)
                break
    graph.recompile()
    return graph


def _rows_of(node: fx.Node) -> int:
    """Return how many large rows there are in what a pointwise node takes; 0 where it takes no stack of such."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags or node.kwargs:
        return 0
    if not isinstance(value := node.meta.get("val"), torch.Tensor):
        return 0
    tensors: list[Any] = [arg for arg in node.args if isinstance(arg, fx.Node)]
    counts = {len(arg.args[0]) for arg in tensors if _is_stack(arg) and arg.meta["val"].shape == value.shape}
    if len(counts) != 1 or value[0].numel() < LARGE or any(isinstance(arg, (list, tuple)) for arg in node.args):
        return 0
    (count,) = counts
    shapes = [arg.meta["val"].shape for arg in tensors]
    return count if all(len(shape) < value.ndim or shape[0] == count for shape in shapes) else 0


def _row(graph: fx.GraphModule, arg: Any, of: fx.Node, number: int) -> Any:
    if not isinstance(arg, fx.Node) or arg.meta["val"].ndim < of.meta["val"].ndim:
        return arg
    return arg.args[0][number] if _is_stack(arg) else call(graph, _ATEN.select.int, [arg, 0, number])  # type: ignore[index]


def _is_stack(node: fx.Node) -> bool:
    return node.target is _ATEN.stack.default and (*node.args[1:], *node.kwargs.values()) in ((), (0,))


def _is_large(arg: Any, of: fx.Node) -> bool:
    """Return whether an argument is large, and as large as the result."""
    there = isinstance(arg, fx.Node) and arg.meta["val"].shape == of.meta["val"].shape
    return there and arg.meta["val"].numel() >= LARGE


def _is_product(node: Any) -> bool:
    while node.target is _ATEN.t.default:
        node = node.args[0]
    return node.target is _ATEN.mm.default


class Halves(NamedTuple):
    """A graph cut in two.

    Attributes:
        forward: (inputs, read) to (outputs, kept).
        backward: (inputs, kept, cotangents, read) to gradients.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule


def cut(graph: fx.GraphModule, inputs: int, outputs: int, read: int) -> Halves:
    """Cut (inputs, cotangents, read) → (outputs, gradients) into a forward and a backward graph.

    Kept is what is random or heavy in the first and needed by the second; the rest is computed again. Where a product
    is added to something, as a step adds one to a weight, the sum is kept: it takes as much memory, and what is the sum
    of many is not added up again each time.

    Args:
        graph: the whole.
        inputs: how many inputs are no cotangents.
        outputs: how many outputs are no gradients.
        read: how many inputs, the last ones, go to both.
    """
    nodes = list(graph.graph.nodes)
    places, results = [node for node in nodes if node.op == "placeholder"], nodes[-1].args[0]
    first = _ancestors(results[:outputs])
    sums = _sums_of_kept(nodes)
    stop = {node for node in first if (_kept(node) or node in sums) and not _is_taken_apart(node)}
    needed = _ancestors(results[outputs:], stop)
    kept = [node for node in nodes if node in stop and node in needed]
    given, both = places[: len(places) - read], places[len(places) - read :]
    forward = _copied(graph, [*given[:inputs], *both], [*results[:outputs], *kept])
    return Halves(forward, _copied(graph, [*given[:inputs], *kept, *given[inputs:], *both], list(results[outputs:])))


def taken(graph: fx.GraphModule, which: Sequence[int]) -> fx.GraphModule:
    """Return the graph of some of the outputs, which takes all that the whole takes."""
    nodes = list(graph.graph.nodes)
    results = nodes[-1].args[0]
    return _copied(graph, [node for node in nodes if node.op == "placeholder"], [results[each] for each in which])


def _ancestors(roots: Sequence[Any], stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    waiting = [root for root in roots if root is not None]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [] if node in stop else node.all_input_nodes
    return seen


def _kept(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return _kept(node.all_input_nodes[0])
    packet = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.op == "call_function" and (packet in HEAVY or random)


def _sums_of_kept(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the sums of matrices one of which is kept, or a multiple of such a one, or such a sum."""
    made_of_kept, sums = set[fx.Node](), set[fx.Node]()
    for node in nodes:
        made_of = term(Matrix(node))
        parts = [made_of.first, made_of.second] if isinstance(made_of, Sum) else []
        parts += [made_of.matrix] if isinstance(made_of, Multiple) else []
        if any(part.node in made_of_kept or _kept(part.node) for part in parts):
            made_of_kept.add(node)
            sums |= {node} if isinstance(made_of, Sum) else set()
    return sums


def _is_taken_apart(node: fx.Node) -> bool:
    return any(user.target is operator.getitem for user in node.users)


def _copied(graph: fx.GraphModule, given: list[fx.Node], wanted: list[Any]) -> fx.GraphModule:
    new, there = fx.Graph(), dict[fx.Node, fx.Node]()
    for number, node in enumerate(given):
        there[node] = new.placeholder(f"x{number}")
        there[node].meta = dict(node.meta)
    part = _ancestors(wanted, set(given))
    for node in graph.graph.nodes:
        if node in part and node not in there:
            there[node] = new.node_copy(node, there.__getitem__)
    new.output([there[node] for node in wanted])
    return fx.GraphModule(graph, new)
