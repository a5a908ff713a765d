"""Flat ATen graphs of functions that take derivatives inside: traced, made free of side effects, compiled.

:func:`trace` runs a function once on fake tensors and writes down every ATen operation, also those of
``torch.autograd.grad`` inside it: what comes out needs no autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass, get_CSE_banned_ops

from lightning_bilevel.compiled.onednn import with_onednn
from lightning_bilevel.compiled.passes import apart, as_in_memory, by_rows, without_alpha
from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.kernels.onednn import is_faster
from lightning_bilevel.randomness import forks_told

Backend = Literal["inductor", "flat"]
Call = Callable[[list[Tensor]], Sequence[Tensor]]

MOST_NUMBERS_OF_A_CUDA_GRAPH = 2**23
"""Numbers that a graph may take to be a CUDA graph: these are copied at every call, and so is what it returns."""

_ATEN = torch.ops.aten


class Traced(NamedTuple):
    """A graph, and what it takes and returns.

    Attributes:
        graph: takes the arguments and then what is ``read``; returns what there is of the outputs.
        present: which of the function's outputs there are.
        read: the tensors that the function reads besides its arguments.
        literal: which of these are written in the code (``torch.tensor(1.0)``).
        forks: where generators are put back: whether a fork begins, or ends, and after how many draws; last, how many
            there are. Empty where nothing is drawn that is put back.
    """

    graph: fx.GraphModule
    present: list[bool]
    read: list[Tensor]
    literal: list[bool]
    forks: Sequence[tuple[bool, int]] = ()


def trace(fn: Callable[[list[Tensor]], list[Tensor | None]], args: Sequence[Tensor]) -> Traced:
    """Return the graph of ``fn`` at arguments of these shapes.

    The arguments are copied: a tensor that comes twice (a shared parameter in θ and in φ) would be one input. Where
    ``fn`` reads one of them besides, as a closure that holds it does, that is the argument.
    A branch on data raises, for fake tensors have none.

    >>> traced = trace(lambda args: [2 * args[0].square(), None], [torch.ones(2)])
    >>> traced.graph(torch.tensor([1.0, 3.0])), traced.present
    ([tensor([ 2., 18.])], [True, False])
    """
    present: list[bool] = []
    forks: list[tuple[bool, int]] = []

    def forked(begins: bool) -> None:
        forks.append((begins, _draws(get_proxy_mode().tracer.graph)))  # type: ignore[union-attr]

    def flat(*inputs: Tensor) -> list[Tensor]:
        outputs = fn(list(inputs))
        present[:] = [output is not None for output in outputs]
        return [output for output in outputs if output is not None]

    copies = [arg.detach().clone() for arg in args]
    with torch.enable_grad(), forks_told(forked):
        graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*copies)
    forks.append((False, _draws(graph.graph)))
    read, literal = _lifted(graph)
    read, literal = _without_arguments(graph, args, read, literal)
    if any(_writes(node) for node in graph.graph.nodes):  # BatchNorm's statistics, `clamp_`: written out of place
        with torch.no_grad():
            functional = torch.func.functionalize(as_in_memory(graph), remove="mutations")
            graph = make_fx(functional, tracing_mode="fake")(*copies, *read)
        if _lifted(graph)[0]:
            raise NotCompiled("it writes to a tensor that cannot be followed")
    return Traced(_tidy(graph), present, read, literal, forks if _puts_back(forks) else ())


def is_random(node: fx.Node) -> bool:
    """Return whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _draws(graph: fx.Graph) -> int:
    return sum(map(is_random, graph.nodes))


def _puts_back(forks: Sequence[tuple[bool, int]]) -> bool:
    """Return whether anything is drawn within a fork."""
    depth, before = 0, 0
    for begins, draws in forks[:-1]:
        if depth and draws > before:
            return True
        depth, before = depth + (1 if begins else -1), draws
    return False


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _lifted(graph: fx.GraphModule) -> tuple[list[Tensor], list[bool]]:
    """Make inputs of the tensors that a graph holds: Inductor would take them for constants.

    Returns:
        The tensors, and which of them are literals (``torch.tensor(1.0)``).
    """
    held: dict[str, Tensor] = {}
    inputs: dict[str, fx.Node] = {}
    literal: dict[str, bool] = {}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        name = str(node.target)
        if name not in held:
            held[name], literal[name] = getattr(graph, name), True
            with graph.graph.inserting_after(last):
                inputs[name] = last = graph.graph.placeholder(f"read_{len(held)}")
            last.meta = dict(node.meta)
        literal[name] &= all(user.target is _ATEN.lift_fresh_copy.default for user in node.users)
        node.replace_all_uses_with(inputs[name])
        graph.graph.erase_node(node)
    graph.graph.set_codegen(fx.graph.CodeGen())
    graph.recompile()
    return list(held.values()), list(literal.values())


def _without_arguments(
    graph: fx.GraphModule, args: Sequence[Tensor], read: list[Tensor], literal: list[bool]
) -> tuple[list[Tensor], list[bool]]:
    """Take the arguments in the places of inputs that are the same tensors; return the other ones."""
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    given = {id(arg): place for arg, place in zip(args, places, strict=False)}
    others: list[tuple[Tensor, bool]] = []
    for value, plain, place in zip(read, literal, places[len(args) :], strict=True):
        if id(value) in given:
            place.replace_all_uses_with(given[id(value)])
            graph.graph.erase_node(place)
        else:
            others.append((value, plain))
    graph.recompile()
    return [value for value, _ in others], [plain for _, plain in others]


def _tidy(graph: fx.GraphModule) -> fx.GraphModule:
    for node in list(graph.graph.nodes):
        if node.target in (_ATEN.detach.default, _ATEN.alias.default):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    unlike = {_ATEN.native_batch_norm, _ATEN.clone}  # it writes to copies of buffers, which no schema says
    unlike |= {node.target.overloadpacket for node in graph.graph.nodes if is_random(node)}
    tidied: fx.GraphModule = CSEPass(get_CSE_banned_ops() | unlike)(graph).graph_module  # type: ignore[union-attr]
    tidied.graph.eliminate_dead_code()
    tidied.recompile()
    return tidied


@functools.cache
def backend_for(kind: str) -> Backend:
    """Return what compiles for a kind of device: Inductor where its compiler is there, else the graph's own code."""
    if kind == "cpu":
        try:
            import_module("torch._inductor.cpp_builder").get_cpp_compiler()  # here, for it takes long to import
        except Exception:  # of several kinds, by platform and version
            return "flat"
        return "inductor"
    has_triton = getattr(getattr(torch.utils, "_triton", None), "has_triton", lambda: False)
    return "inductor" if kind == "cuda" and has_triton() else "flat"


def compiled(graph: fx.GraphModule, examples: Sequence[Tensor], backend: Backend) -> Call:
    """Return a function of a list of tensors: by Inductor, or the graph's own code.

    Random numbers are those of the eager kernels, so that runs of a forward graph and of one with a derivative agree.
    """
    if is_faster():
        graph = with_onednn(graph)
    if backend == "flat":
        return lambda args: graph(*args)
    # Without an environment of shapes Inductor leaves out its cache on the disk. There is one, and all are fixed.
    mode = FakeTensorMode(shape_env=import_module("torch.fx.experimental.symbolic_shapes").ShapeEnv())
    inputs: list[Any] = [mode.from_tensor(each, static_shapes=True) for each in examples]
    graph, launched_at_once = apart(by_rows(without_alpha(graph))), fits_a_cuda_graph(examples)
    options = {"fallback_random": True, "triton.cudagraphs": launched_at_once}
    with tracing(TracingContext(mode)):
        function: Any = torch._inductor.compile(graph, inputs, options=options)
    if not launched_at_once:
        return lambda args: function(*args)
    for _ in range(2):  # the first call warms up, the second one records: what is compared with eager is a replay
        function(*examples)
    return lambda args: [value.clone() for value in function(*args)]  # the next replay writes where this one did


def fits_a_cuda_graph(examples: Sequence[Tensor]) -> bool:
    """Return whether a graph of these arguments is launched as one: all are on a GPU, and small."""
    small = sum(each.numel() for each in examples) <= MOST_NUMBERS_OF_A_CUDA_GRAPH
    return small and all(each.is_cuda for each in examples)
