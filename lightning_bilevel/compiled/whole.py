"""The outer loss at the end of a run that is one graph with it: when it holds, and what it leaves behind.

A short run of a small net takes most of its time in what surrounds its operations. Its steps, the outer loss at their
end and the gradient of that are one graph then.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bilevel.calculus.base import Whole
from lightning_bilevel.compiled.program import Form, Layout, Part
from lightning_bilevel.compiled.sight import Sight
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.problem import BilevelProblem, InnerState
from lightning_bilevel.tree import Params


class Judged(NamedTuple):
    """The outer loss on a batch.

    Attributes:
        key: tells what it is now from what it was at other times.
        sight: tells that, and sees what it reads.
        form: that of the batch.
        tensors: those of the batch.
    """

    key: Hashable
    sight: Sight
    form: Form
    tensors: list[Tensor]


def ended(
    problem: BilevelProblem,
    functional: FunctionalModule,
    layout: Layout,
    part: Part,
    state: InnerState,
    phi: Params,
    results: Sequence[Tensor],
) -> Whole:
    """Return a run from what its graph has returned; the losses leave behind what they do in eager.

    Args:
        problem: whose run it is.
        functional: the module.
        layout: names the results.
        part: the graph.
        state: before the run.
        phi: outer parameters.
        results: of the graph.
    """
    part.tell(results, functional)
    names, buffers, m = layout.names, layout.buffers, layout.outputs - 1
    flat = dict(zip(names, results, strict=False))
    after = layout.state(
        flat, dict(zip(buffers, results[len(names) : m], strict=True)), state.steps + len(layout.order)
    )
    value, *rest = results[part.outputs :]
    n = len(buffers) + part.left.size
    part.left.leave(functional, dict(zip(buffers, rest, strict=False)), value, rest[len(buffers) : n], rest[n:])
    observed = None if problem.observer is None else problem.observer.observe()
    own = layout.own
    gradients = iter(rest[len(rest) - len(own) - sum(part.live) :])
    d = {name: next(gradients) for name in own}
    c = {
        name: next(gradients) if live else torch.zeros_like(phi[name])
        for name, live in zip(layout.outer, part.live, strict=True)
    }
    return Whole(after, [results[m]], value, d, c, observed)
