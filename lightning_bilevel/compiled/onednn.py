"""Large matrix products by oneDNN, on CPUs on which MKL is slow.

MKL makes float32 products on AMD's CPUs at half of what oneDNN does, which the same PyTorch has inside (100 and 205
GFLOP/s were measured there). There is no public switch for float32, so graphs call PyTorch's operator for linear
layers. Which products go there is decided by the vendor and by their size, never by a measurement, so that a resumed
fit takes the same kernels.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor, fx

LEAST_OPERATIONS = 2_000_000
"""Operations of a product below which MKL is as fast."""

_ATEN = torch.ops.aten
_LIBRARY = torch.library.Library("lightning_bilevel", "DEF")
_LIBRARY.define("product(Tensor a, Tensor b) -> Tensor")


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b; an operator of our own, for Inductor takes oneDNN's with constant weights only."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return result


def _fake_product(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


_LIBRARY.impl("product", _product, "CPU")
torch.library.register_fake("lightning_bilevel::product", _fake_product, lib=_LIBRARY)


@functools.cache
def is_faster() -> bool:
    """Return whether oneDNN is there, and known to be faster than MKL on this CPU."""
    there = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and torch.backends.mkldnn.is_available() and "AuthenticAMD" in _vendor()


def _vendor() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else platform.processor()


def with_onednn(graph: fx.GraphModule) -> fx.GraphModule:
    """Let oneDNN make the large float32 products of a graph; those of expanded tensors it makes slowly.

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
        if not _is_large(a.meta["val"], b.meta["val"]):
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


def _is_large(a: Tensor, b: Tensor) -> bool:
    plain = all(x.dtype == torch.float32 and x.device.type == "cpu" and 0 not in x.stride() for x in (a, b))
    return plain and 2 * a.numel() * b.shape[1] >= LEAST_OPERATIONS
