"""Inspections of a problem that the audit runs in the surroundings of an estimate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.step import inner_step
from lightning_bilevel.estimation import estimate
from lightning_bilevel.modules.examine import once_differentiable
from lightning_bilevel.problem import Hypergradient
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies import FirstOrder
from lightning_bilevel.training.estimating import Surroundings


class Graphs(NamedTuple):
    """What the graphs of both losses tell.

    Attributes:
        once: name and line of functions in the inner loss that can be differentiated once only.
        flat: why the outer loss has no gradient, as sentences; empty where it has one.
    """

    once: tuple[tuple[str, str], ...] = ()
    flat: str = ""


def graphs(at: Surroundings) -> Graphs:
    """Evaluate both losses once, and name the user's lines in their graphs."""
    problem, episode = at.problem.on(at.episodes[0]), at.episodes[0]
    start = problem.start(at.carried[0], at.phi)
    theta, outer = tree.leaves(start.params), tree.leaves(at.phi)
    once, flat = [], ""
    with torch.enable_grad(), torch.autograd.set_detect_anomaly(True, check_nan=False):
        value = problem.outer_loss(theta, outer, episode.outer, start.buffers)
        if not value.requires_grad:
            flat = (
                "it is cut off from the parameters. Look for `argmax`, `round`, a comparison, `detach`, `.item()` "
                "or `no_grad` in `outer_loss`; only `ZerothOrder` can do without a gradient."
            )
        if problem.solver is None:
            inner, _ = problem.inner_loss(theta, outer, episode.inner[0], start.buffers)
            once = once_differentiable(inner)
    return Graphs(tuple(once), flat)


def saved_bytes(at: Surroundings) -> int:
    """Return what autograd saves of a further inner step: bytes of storages for the backward pass."""
    problem, sizes = at.problem.on(at.episodes[0]), []
    step, batch = inner_step(problem), problem.batches(at.episodes[0])[0]
    start = problem.start(at.carried[0], at.phi)
    for steps in (1, 2):
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step.vjp(start, at.phi, [batch] * steps)
        sizes.append(sum(storages.values()))
    return sizes[1] - sizes[0]


def stacked(at: Surroundings, call: Call) -> Hypergradient:
    """Return the first-order estimate of an episode taken twice at once, as several episodes are where they stack."""
    twice = at._replace(carried=at.carried[:1] * 2, episodes=[at.episodes[0]] * 2)
    return estimate(twice.problem, FirstOrder(), twice.carried, twice.phi, twice.episodes, call, chunk_size=2)
