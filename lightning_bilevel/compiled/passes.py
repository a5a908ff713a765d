"""What is done to a flat graph: made right where Inductor is wrong, and cut into forward and backward."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

_ATEN = torch.ops.aten
HEAVY = {
    "mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "native_batch_norm",
    "native_batch_norm_backward", "native_layer_norm", "native_layer_norm_backward", "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional", "_log_softmax", "_softmax",
}  # fmt: skip
"""What a backward graph is given rather than computes again."""


def without_alpha(graph: fx.GraphModule) -> fx.GraphModule:
    """Write a + s·b for add(a, b, alpha=s): Inductor drops the s where b, or a, is a matrix product (PyTorch 2.13)."""
    for node in list(graph.graph.nodes):
        if node.target in (_ATEN.add.Tensor, _ATEN.sub.Tensor) and node.kwargs.get("alpha", 1) != 1:
            with graph.graph.inserting_before(node):
                scaled = graph.graph.call_function(_ATEN.mul.Tensor, (node.args[1], node.kwargs["alpha"]))
                scaled.meta["val"] = node.args[1].meta["val"] * node.kwargs["alpha"]
            node.update_arg(1, scaled)
            node.kwargs = {}
    graph.recompile()
    return graph


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

    Kept is what is random or heavy in the first and needed by the second; the rest is computed again.

    Args:
        graph: the whole.
        inputs: how many inputs are no cotangents.
        outputs: how many outputs are no gradients.
        read: how many inputs, the last ones, go to both.
    """
    nodes = list(graph.graph.nodes)
    places, results = [node for node in nodes if node.op == "placeholder"], nodes[-1].args[0]
    first = _ancestors(results[:outputs])
    stop = {node for node in first if _kept(node) and not _is_taken_apart(node)}
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
