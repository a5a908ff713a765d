"""What looks at a bilevel problem from where a strategy stands: for an audit, which only has estimates to go by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.inner_loop import run
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.modules.examine import once_differentiable
from lightning_bilevel.problem import BilevelProblem, Episode, Hypergradient, InnerState, stack_episodes
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies import FirstOrder, HypergradientStrategy
from lightning_bilevel.tree import Params


class Probe(HypergradientStrategy):
    """What looks at a problem from where a strategy stands."""

    exact = unbiased = second_order = stacks = False
    requires: Literal["solve", "step", "inner_loss"] = "solve"
    memory = cost = ""


class Short(Probe):
    """A strategy on the first inner steps; twice where it carries something from one estimate to the next."""

    def __init__(self, strategy: HypergradientStrategy, steps: int) -> None:
        self.strategy, self.steps, self.stacks = strategy, steps, strategy.stacks

    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Estimate on a short run."""
        short = replace(problem, inner_steps=min(self.steps, problem.inner_steps))
        result = self.strategy.estimate(short, memory, phi, episode, call)
        if self.strategy.carried():
            result = self.strategy.estimate(short, memory, phi, episode, call)
        return result

    def all_refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return the strategy's, for the whole number of inner steps."""
        return self.strategy.all_refusals(problem)


class Graphs(Probe):
    """Looks at the graphs of both losses.

    Attributes:
        once: name and line of functions in the inner loss that can be differentiated once only.
        flat: why the outer loss has no gradient, as sentences; empty where it has one.
    """

    def __init__(self) -> None:
        self.once: list[tuple[str, str]] = []
        self.flat = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return self  # what the copy that runs sees is wanted here

    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Evaluate both losses once; the estimate is zero."""
        start = problem.start(memory, phi)
        theta, outer = tree.leaves(start.params), tree.leaves(phi)
        with torch.enable_grad(), torch.autograd.set_detect_anomaly(True, check_nan=False):
            value = problem.outer_loss(theta, outer, episode.outer, memory.buffers)
            if not value.requires_grad:
                self.flat = (
                    "it is cut off from the parameters. Look for `argmax`, `round`, a comparison, `detach`, `.item()` "
                    "or `no_grad` in `outer_loss`; only `ZerothOrder` can do without a gradient."
                )
            if problem.solver is None:
                inner, _ = problem.inner_loss(theta, outer, episode.inner[0], memory.buffers)
                self.once = once_differentiable(inner)
        return Hypergradient(torch.zeros(()), tree.zeros_like(phi), start, {})


class Saved(Probe):
    """Records one inner step, and two, and adds up what the graphs keep.

    Attributes:
        sizes: bytes of the storages that are saved for the backward pass.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Saved:
        return self

    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Take the steps; the estimate is zero."""
        outer = tree.leaves(phi)
        for steps in (1, 2):
            storages: dict[int, int] = {}

            def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
                return tensor

            short = replace(problem, inner_steps=steps)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                final, _ = run(short, short.start(memory, outer), outer, short.batches(episode), create_graph=True)
            self.sizes.append(sum(storages.values()))
        return Hypergradient(torch.zeros(()), tree.zeros_like(phi), final.detach(), {})


class Stacked(Probe):
    """First-order on an episode twice at once, as the episodes of a batch are estimated where they are stacked."""

    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Estimate on the stack."""
        both = InnerState(tree.expand(memory.params, 2), tree.expand(memory.buffers, 2))
        return FirstOrder().estimate(problem.stack(2), both, phi, stack_episodes([episode, episode]), call)
