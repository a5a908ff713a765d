"""Does `torch.compile` of an inner step pay? Time, compile time and agreement, for what the strategies are made of.

Compiled are four functions of a weighted loss g(θ, φ) on one batch, taken from the library's own `BilevelProblem`, so
that what is traced is a user's method called on a module with tensors swapped in:

- `gradient`: ∇_θ g, all there is of a plain inner run (`FirstOrder`, `PZOBO`, `ZerothOrder`, implicit gradients);
- `step`: the same with the inner optimizer's update;
- `products`: v ↦ (v ∂²g/∂θ², v ∂²g/∂θ∂φ), forward pass and both backward passes in one graph, as a compiled reverse
  or implicit mode would need them;
- `tangent`: the derivative of ∇_θ g along a direction, forward over reverse, as a compiled forward mode would.

Beside them `double backward` tries what a user would get from compiling the loss alone and differentiating it twice.
Times are CPU seconds of one thread, least of some, in turns; the compile time is CPU seconds too, with the compiler's
own processes. Everything compiled is compared with what was not.

    python benchmarks/cost/compile_inner.py [--nets "small MLP" MLP CNN GPT-2]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from lightning_bilevel import tree
from lightning_bilevel.calculus import inner_step
from lightning_bilevel.problem import BilevelProblem, InnerState
from lightning_bilevel.tree import Params

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.measure import least_seconds
from support.problems import NETS, Net, episodes, module
from support.results import keep

PARTS = ("gradient", "step", "products", "tangent")


def parts(
    problem: BilevelProblem, state: InnerState, phi: Params, batch: Any
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Return the functions to compile with their arguments."""
    vector = tree.map(torch.ones_like, state.params)

    def gradient(params: Params, outer: Params) -> Params:
        theta = tree.leaves(params)
        with torch.enable_grad():
            loss, _ = problem.inner_loss(theta, outer, batch, state.buffers)
            return tree.detach(tree.grad(loss, theta))

    def step(params: Params, outer: Params) -> Params:
        return inner_step(problem)(replace(state, params=params), outer, batch)[0].params

    def products(params: Params, outer: Params, v: Params) -> list[Tensor]:
        theta, leaves = tree.leaves(params), tree.leaves(outer)
        with torch.enable_grad():
            loss, _ = problem.inner_loss(theta, leaves, batch, state.buffers)
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            inputs = [*theta.values(), *leaves.values()]
            found = torch.autograd.grad(grads, inputs, list(v.values()), allow_unused=True)
        return [each.detach() for each in found if each is not None]

    def tangent(params: Params, outer: Params, v: Params) -> Params:
        gradient = torch.func.grad(lambda theta: problem.inner_loss(theta, outer, batch, state.buffers)[0])
        return torch.func.jvp(gradient, (params,), (v,))[1]

    first, second = (state.params, phi), (state.params, phi, vector)
    return {
        "gradient": (gradient, first),
        "step": (step, first),
        "products": (products, second),
        "tangent": (tangent, second),
    }


def double_backward(problem: BilevelProblem, state: InnerState, phi: Params, batch: Any) -> str:
    """Return what happens when a compiled loss is differentiated twice."""
    compiled = torch.compile(lambda theta, outer: problem.inner_loss(theta, outer, batch, state.buffers)[0])
    theta, outer = tree.leaves(state.params), tree.leaves(phi)
    try:
        grads = torch.autograd.grad(compiled(theta, outer), list(theta.values()), create_graph=True)
        torch.autograd.grad(sum(grad.sum() for grad in grads), list(theta.values()), allow_unused=True)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "works"


def compile_and_compare(
    function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[dict[str, Any], Callable[..., Any]]:
    """Return the compile time, graph breaks and the difference of the results, and the compiled function."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function)
    before, wall = cpu_with_children(), time.perf_counter()
    found = tree_leaves(compiled(*arguments))
    row: dict[str, Any] = {"compile seconds": cpu_with_children() - before, "compile wall": time.perf_counter() - wall}
    compiled(*arguments)  # may compile once more
    right = tree_leaves(function(*arguments))
    norms = [torch.stack([each.norm() for each in part]).norm() for part in (map(torch.sub, found, right), right)]
    row["difference"] = float(norms[0] / norms[1])
    row["graph breaks"] = sum(counters["graph_break"].values())
    return row, compiled


def cpu_with_children() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(net: Net, repeats: int, wanted: Sequence[str]) -> dict[str, Any]:
    problem_of = module(net, 1)
    functional = problem_of.functional()
    episode = episodes(net, 1)[0]
    rows: dict[str, Any] = {}
    with functional.session():
        problem, phi = functional.problem, functional.phi()
        state = problem.start(InnerState(functional.theta()), phi)
        for name, (function, arguments) in parts(problem, state, phi, episode.inner[0]).items():
            if name not in wanted:
                continue
            try:
                row, compiled = compile_and_compare(function, arguments)
                contenders = {
                    "eager": lambda f=function, a=arguments: f(*a),
                    "compiled": lambda f=compiled, a=arguments: f(*a),
                }
                row |= least_seconds(contenders, repeats, at_least=0.5)
            except Exception as error:
                row = {"fails": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            rows[name] = row
            print(f"{net.text:50s} {name:10s} {row}", flush=True)
        rows["double backward"] = double_backward(problem, state, phi, episode.inner[0])
        print(rows["double backward"])
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), help="results of the others are kept")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is compiled")
    parser.add_argument("--repeats", type=int, default=20, help="calls timed (%(default)s)")
    args = script.begin(parser, argv)
    warnings.simplefilter("ignore")  # torch's deprecations while it compiles
    torch._dynamo.config.trace_autograd_ops = True  # else a gradient within a compiled function breaks its graph
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # nothing is found compiled already
        for name in args.nets:
            found = {"text": NETS[name].text, **measure(NETS[name], args.repeats, args.parts)}
            results = keep("compile_inner", {"repeats": args.repeats}, found, name)
    return results


if __name__ == "__main__":
    main()
