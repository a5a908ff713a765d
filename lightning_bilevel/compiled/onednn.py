"""Large matrix products of a graph by oneDNN, see :mod:`lightning_bilevel.kernels.onednn`."""

from __future__ import annotations

import torch
from torch import fx

from lightning_bilevel.kernels.onednn import is_large

_ATEN = torch.ops.aten


def with_onednn(graph: fx.GraphModule) -> fx.GraphModule:
    """Let oneDNN make the large float32 products of a graph.

    >>> from lightning_bilevel.compiled.graphs import trace
    >>> args = [torch.randn(200, 100), torch.randn(100, 100)]
    >>> graph = with_onednn(trace(lambda args: [args[0] @ args[1]], args).graph)
    >>> torch.allclose(graph(*args)[0], args[0] @ args[1], atol=1e-4)
    True
    """
    for node in list(graph.graph.nodes):
        if node.target not in (_ATEN.mm.default, _ATEN.addmm.default) or node.kwargs:
            continue
        *bias, a, b = node.args
        if not is_large(a.meta["val"], b.meta["val"]):
            continue
        with graph.graph.inserting_before(node):
            product = graph.graph.call_function(torch.ops.lightning_bilevel.product.default, (a, b))
            product.meta = dict(node.meta)
            if bias:
                product = graph.graph.call_function(_ATEN.add.Tensor, (product, *bias))
                product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph
