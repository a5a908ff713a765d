"""Large products by oneDNN are the same products; which are made so is decided by the vendor and the size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from lightning_bilevel.compiled import graphs
from lightning_bilevel.compiled.graphs import compiled, trace
from lightning_bilevel.compiled.onednn import with_onednn
from lightning_bilevel.kernels import onednn
from tests.support.compiled import CLASSES, FEATURES, apart, both, episode, needs_inductor, weighted

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="there is no oneDNN")
pytestmark = needs_onednn


def products(graph: fx.GraphModule) -> int:
    return sum(node.target is torch.ops.lightning_bilevel.product.default for node in graph.graph.nodes)


def layers(args: list[Tensor]) -> list[Tensor | None]:
    """Return two linear layers' gradients: products with and without a bias, of transposed factors, too."""
    w, v = (arg.detach().requires_grad_() for arg in args[:2])
    hidden = torch.nn.functional.linear(args[2], w, args[3]).tanh()
    return list(torch.autograd.grad((hidden @ v).square().mean(), [w, v]))


ARGS = [torch.randn(128, 100), torch.randn(128, 100), torch.randn(200, 100), torch.randn(128)]


def test_products_are_the_same() -> None:
    expected = layers(ARGS)
    graph = with_onednn(trace(layers, ARGS).graph)
    assert products(graph) == 5
    for a, b in zip(graph(*ARGS), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("rows", "dtype", "expands"),
    [
        pytest.param(20, torch.float32, False, id="small"),
        pytest.param(200, torch.float64, False, id="float64"),
        pytest.param(200, torch.float32, True, id="expanded"),
    ],
)
def test_others_are_left_as_they_are(rows: int, dtype: torch.dtype, expands: bool) -> None:
    def product(args: list[Tensor]) -> list[Tensor | None]:
        return [(args[0][:1].expand(rows, 100) if expands else args[0]) @ args[1]]

    args = [torch.randn(rows, 100, dtype=dtype), torch.randn(100, 100, dtype=dtype)]
    assert products(with_onednn(trace(product, args).graph)) == 0


def test_an_estimate_with_the_choice_forced_on(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    seen = []

    def counted(graph: fx.GraphModule) -> fx.GraphModule:
        graph = with_onednn(graph)
        seen.append(products(graph))
        return graph

    monkeypatch.setattr(graphs, "is_faster", lambda: True)
    monkeypatch.setattr(graphs, "with_onednn", counted)
    monkeypatch.setattr(onednn, "LEAST_OPERATIONS", 100)
    module = weighted(net=lambda: nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, CLASSES)))
    assert apart(*both(module, episodes=episode())) < 2e-6
    assert sum(seen) > 5
    assert calls


@pytest.mark.slow
@needs_inductor
def test_by_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "is_faster", lambda: True)
    counters = torch._dynamo.utils.counters
    traced = trace(layers, ARGS)
    counters.clear()
    function = compiled(traced.graph, [*ARGS, *traced.read], "inductor")
    assert counters["inductor"]
    assert not counters["inductor"]["fxgraph_cache_bypass"]
    for a, b in zip(function([*ARGS, *traced.read]), layers(ARGS), strict=True):
        torch.testing.assert_close(a, b)
