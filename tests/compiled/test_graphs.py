"""Graphs of functions with derivatives inside."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_bilevel import SGD, ForwardGradient, ReverseUnroll, hypergradient
from lightning_bilevel.compiled import graphs
from lightning_bilevel.compiled.graphs import backend_for, compiled, fits_a_cuda_graph, trace
from tests.support.compiled import episode, needs_inductor, weighted


def step(args: list[Tensor]) -> list[Tensor | None]:
    w, x = args[0].detach().requires_grad_(), args[1]
    (grad,) = torch.autograd.grad((x @ w).tanh().sum(), w)
    return [w.detach() - 0.1 * grad, None]


def test_a_graph_has_the_derivatives_inside() -> None:
    w, x = torch.randn(3), torch.randn(4, 3)
    traced = trace(step, [w, x])
    (after,) = traced.graph(w, x)
    torch.testing.assert_close(after, step([w, x])[0])
    assert traced.present == [True, False]
    assert not after.requires_grad


def test_what_is_read_besides_the_arguments_is_an_input() -> None:
    scale = torch.full((2,), 3.0)
    traced = trace(lambda args: [args[0] * scale + torch.tensor(1.0)], [torch.ones(2)])
    assert [value is scale for value in traced.read] == [True, False]
    assert traced.literal == [False, True]
    (found,) = traced.graph(torch.ones(2), 2 * scale, traced.read[1])
    assert found.tolist() == [7.0, 7.0]


def test_the_same_tensor_twice_is_two_inputs() -> None:
    x = torch.ones(2)
    traced = trace(lambda args: [args[0] + 2 * args[1]], [x, x])
    assert traced.graph(torch.zeros(2), torch.ones(2))[0].tolist() == [2.0, 2.0]


def test_what_is_written_in_place_is_written_out_of_place() -> None:
    norm = nn.BatchNorm1d(2, affine=False)

    def run(args: list[Tensor]) -> list[Tensor | None]:
        mean, var, x = args[0].clone(), args[1].clone(), args[2]
        return [nn.functional.batch_norm(x, mean, var, training=True), mean, var]

    args = [norm.running_mean, norm.running_var, torch.randn(4, 2)]
    traced = trace(run, args)
    before = [arg.clone() for arg in args]
    for a, b in zip(traced.graph(*args), run(args), strict=True):
        torch.testing.assert_close(a, b)
    assert all(map(torch.equal, args, before))


def test_a_branch_on_data_raises() -> None:
    with pytest.raises(RuntimeError, match="data-dependent"):
        trace(lambda args: [args[0] if args[0].sum() > 0 else -args[0]], [torch.ones(2)])


def test_random_numbers_are_drawn_at_each_call() -> None:
    traced = trace(lambda args: [args[0] * torch.rand(2)], [torch.ones(2)])
    a, b = traced.graph(torch.ones(2))[0], traced.graph(torch.ones(2))[0]
    assert not torch.equal(a, b)


def test_two_draws_are_not_one() -> None:
    def drawn(args: list[Tensor]) -> list[Tensor | None]:
        masks = [torch.empty_like(args[0]).bernoulli_(0.5) for _ in range(2)]
        noise = [torch.empty_like(args[0]).exponential_() for _ in range(2)]
        return [args[0] * (masks[0] - masks[1]), noise[0] - noise[1]]

    for value in trace(drawn, [torch.ones(100)]).graph(torch.ones(100)):
        assert value.any()


def test_without_a_compiler_graphs_run_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.cpp_builder as builder

    def missing() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(builder, "get_cpp_compiler", missing)
    assert backend_for.__wrapped__("cpu") == "flat"
    assert backend_for.__wrapped__("mps") == "flat"


@needs_inductor
@pytest.mark.slow
def test_inductor_computes_the_same_with_the_same_random_numbers() -> None:
    def run(args: list[Tensor]) -> list[Tensor | None]:
        after, _ = step(args)
        assert after is not None
        return [after * torch.rand(3), torch.add(args[2], args[1] @ args[3], alpha=-0.1)]

    args = [torch.randn(3), torch.randn(4, 3), torch.randn(4, 5), torch.randn(3, 5)]
    traced = trace(run, args)
    function = compiled(traced.graph, [*args, *traced.read], "inductor")
    torch.manual_seed(0)
    expected = run(args)
    torch.manual_seed(0)
    for a, b in zip(function([*args, *traced.read]), expected, strict=True):
        torch.testing.assert_close(a, b)


@needs_inductor
@pytest.mark.slow
def test_what_inductor_has_made_is_kept_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters = torch._dynamo.utils.counters
    traced = trace(lambda args: [args[0].tanh() + args[1]], [torch.ones(3), torch.ones(1)])
    counters.clear()
    for _ in range(2):
        function = compiled(traced.graph, [torch.ones(3), torch.ones(1)], "inductor")
        torch.testing.assert_close(*function([torch.zeros(3), torch.ones(1)]), torch.ones(3))
    assert counters["inductor"]["fxgraph_cache_miss"] == counters["inductor"]["fxgraph_cache_hit"] == 1


@needs_inductor
@pytest.mark.slow
def test_inductor_compiles_for_fixed_shapes() -> None:
    """Also where an argument is a view, whose base would be of any size: slow code, and convolutions may fail."""
    sizes: list[Any] = []

    def look(graph: torch.fx.Graph) -> None:
        values = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        sizes.extend(size for value in values for size in value.shape)

    def convolved(args: list[Tensor]) -> list[Tensor | None]:
        weight, x = args[0].detach().requires_grad_(), args[1]
        (grad,) = torch.autograd.grad(nn.functional.conv2d(x, weight).tanh().sum(), weight)
        return [weight.detach() - 0.1 * grad]

    args = [torch.randn(5, 1, 3, 3)[:4], torch.randn(8, 1, 4, 5)[2:]]
    with torch._inductor.config.patch(post_grad_custom_pre_pass=look):
        function = compiled(trace(convolved, args).graph, args, "inductor")
    assert {type(size) for size in sizes} == {int}
    torch.testing.assert_close(*function(args), *convolved(args))


def test_flat_graphs() -> None:
    traced = trace(lambda args: [args[0] + 1], [torch.ones(1)])
    assert graphs.compiled(traced.graph, [torch.ones(1)], "flat")([torch.ones(1)])[0].item() == 2


def test_what_a_cuda_graph_returns_outlasts_its_next_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def replaying(graph: Any, inputs: Any, options: dict[str, Any]) -> Any:
        place = torch.empty(2)

        def replay(*args: Tensor) -> list[Tensor]:
            calls.append(options)
            return [place.copy_(graph(*args)[0])]

        return replay

    monkeypatch.setattr(torch._inductor, "compile", replaying)
    monkeypatch.setattr(graphs, "fits_a_cuda_graph", lambda examples: True)
    x = torch.ones(2)
    call = compiled(trace(lambda args: [2 * args[0]], [x]).graph, [x], "inductor")
    assert len(calls) == 2  # it has been recorded
    assert all(options["triton.cudagraphs"] for options in calls)
    (first,), (second,) = call([x]), call([3 * x])
    assert (first.tolist(), second.tolist()) == ([2.0, 2.0], [6.0, 6.0])


def test_cuda_graphs_are_for_small_tensors_on_a_gpu() -> None:
    class OnGpu(NamedTuple):
        size: int
        is_cuda: bool = True

        def numel(self) -> int:
            return self.size

    most = graphs.MOST_NUMBERS_OF_A_CUDA_GRAPH
    sizes: list[Any] = [OnGpu(most - 1), OnGpu(1)]
    assert fits_a_cuda_graph(sizes)
    assert not fits_a_cuda_graph([*sizes, OnGpu(1)])
    assert not fits_a_cuda_graph([OnGpu(1), torch.ones(1)])  # which would be a constant of the launch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("most", [0, graphs.MOST_NUMBERS_OF_A_CUDA_GRAPH])
def test_estimates_on_a_gpu_with_cuda_graphs_and_without(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_NUMBERS_OF_A_CUDA_GRAPH", most)
    module = weighted(optimizer=lambda module: SGD(lr=module.log_lr.exp(), momentum=0.9)).to("cuda")
    eager = copy.deepcopy(module)
    eager.compiles_steps = False
    for seed in range(4):  # the third call of a CUDA graph is its first replay
        batch = tree_map_only(Tensor, Tensor.cuda, episode(seed))
        for strategy in (ReverseUnroll(), ReverseUnroll(checkpoint=1), ForwardGradient(4)):
            ours, expected = (hypergradient(each, strategy, batch, seed=seed) for each in (module, eager))
            for name, value in expected.grads.items():
                torch.testing.assert_close(ours.grads[name], value, rtol=1e-4, atol=1e-6)
