"""Graphs of functions that go back to where random generators stood: what they draw is drawn outside of them.

A strategy that steps on both losses puts back what the outer one draws, so that the masks of the inner one are those
of a run without it. A graph cannot: its draws come before it, one after the other, with the generators put back between
them, and it takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lightning_bilevel.compiled.graphs import Backend, Call, compiled, is_random
from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.randomness import RngState

_ATEN = torch.ops.aten
_BY_SHAPE = {
    _ATEN.bernoulli.p, _ATEN.rand_like.default, _ATEN.randn_like.default, _ATEN.randint_like.default,
    _ATEN.randint_like.low_dtype,
}  # fmt: skip
"""What draws by the shape of its argument, whatever numbers are in it."""

Piece = Callable[[], Sequence[Tensor]] | bool
"""Draws; or whether a fork begins, or ends."""


def compiled_forks(
    graph: fx.GraphModule, examples: Sequence[Tensor], backend: Backend, forks: Sequence[tuple[bool, int]]
) -> Call:
    """Return a function of a list of tensors, like :func:`compiled`, that draws as what was traced did.

    Args:
        graph: what was traced, or its first half.
        examples: what the graph takes.
        backend: what compiles.
        forks: where generators were put back, see :class:`Traced`.

    Raises:
        NotCompiled: what it draws depends on numbers that it computes.
    """
    if not forks:
        return compiled(graph, examples, backend)
    pieces = drawn_outside(graph, forks)
    call = compiled(graph, [*examples, *_drawn(pieces, examples[0].device)], backend)
    return lambda args: call([*args, *_drawn(pieces, args[0].device)])


def drawn_outside(graph: fx.GraphModule, forks: Sequence[tuple[bool, int]]) -> list[Piece]:
    """Make inputs of what a graph draws, its last ones, and return what draws them.

    Args:
        graph: it is changed.
        forks: whether one begins, or ends, and after how many draws; the last one: how many there are.
    """
    draws = [node for node in graph.graph.nodes if is_random(node)]
    *marks, (_, total) = forks
    if len(draws) != total:
        raise NotCompiled("it goes back to where a random generator stood, and leaves out some of what it draws")
    pieces, done = list[Piece](), 0
    for begins, at in marks:
        pieces += [_drawing(draws[done:at])] * (at > done)
        pieces.append(begins)
        done = at
    pieces += [_drawing(draws[done:])] * (total > done)
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for number, node in enumerate(draws):
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"drawn_{number}")
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return pieces


def _drawing(nodes: Sequence[fx.Node]) -> Callable[[], Sequence[Tensor]]:
    """Return what draws as these operations do, which must not depend on what else a graph computes."""
    graph = fx.Graph()

    def copied(node: fx.Node) -> fx.Node:
        if node.op != "call_function" or is_random(node):
            raise NotCompiled("what it draws, and puts back, depends on numbers that it computes")
        return called(node, copied)

    def shaped(node: fx.Node) -> fx.Node:
        like = node.meta["val"]
        given = {"dtype": like.dtype, "device": like.device}
        return graph.call_function(_ATEN.empty_strided.default, (tuple(like.shape), like.stride()), given)

    def called(node: fx.Node, taken: Callable[[fx.Node], fx.Node]) -> fx.Node:
        target: Any = node.target
        return graph.call_function(target, fx.node.map_arg(node.args, taken), fx.node.map_arg(node.kwargs, taken))

    graph.output([called(node, shaped if node.target in _BY_SHAPE else copied) for node in nodes])
    drawing: Callable[[], Sequence[Tensor]] = fx.GraphModule({}, graph)
    return drawing


def _drawn(pieces: Sequence[Piece], device: torch.device) -> list[Tensor]:
    found, before = list[Tensor](), list[RngState]()
    for piece in pieces:
        if piece is True:
            before.append(RngState(device, ()))
        elif piece is False:
            before.pop().restore()
        else:
            found += piece()
    return found
