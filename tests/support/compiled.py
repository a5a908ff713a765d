"""A small problem of example weights with something in its losses or its optimizer that a compiled step may miss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, Episode, HypergradientStrategy, ReverseUnroll, hypergradient, tree
from lightning_bilevel.compiled.graphs import backend_for
from lightning_bilevel.problem import Hypergradient
from lightning_bilevel.tree import Params

FEATURES, CLASSES, EXAMPLES = 4, 3, 6

needs_inductor = pytest.mark.skipif(backend_for("cpu") != "inductor", reason="there is no C++ compiler")


class Weighted(BilevelModule):
    """Weights of examples are learned, and the inner rate may be.

    Args:
        term: of the module and the inner loss, to the inner loss.
        optimizer: of the module.
        net: the inner net.
        options: of ``BilevelModule``.
    """

    def __init__(
        self,
        term: Callable[[Any, Tensor], Tensor] = lambda self, loss: loss,
        optimizer: Callable[[Any], Any] = lambda self: SGD(lr=0.3),
        net: Callable[[], nn.Module] = lambda: nn.Linear(FEATURES, CLASSES),
        **options: Any,
    ) -> None:
        super().__init__(**{"inner_steps": 3, "inner_start": "reset", "compile": True, "allow_unused": True, **options})
        self.net, self.term, self.optimizer = net(), term, optimizer
        self.logits, self.log_lr = nn.Parameter(torch.zeros(EXAMPLES)), nn.Parameter(torch.tensor(-1.0))

    def inner_parameters(self) -> Any:
        return self.net.parameters()

    def inner_loss(self, batch: Any) -> Tensor:
        x, y, index = batch
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        return self.term(self, (self.logits[index].sigmoid() * losses).mean())

    def outer_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_inner_optimizer(self) -> Any:
        return self.optimizer(self)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([self.logits, self.log_lr], lr=0.1)


def weighted(**options: Any) -> Weighted:
    """Return a :class:`Weighted` drawn from seed 0, whatever is in it."""
    torch.manual_seed(0)
    return Weighted(**options)


def logged(module: Any, loss: Tensor) -> Tensor:
    """Log twice the loss, which a graph has to return, and a number: a term of :class:`Weighted`."""
    module.log("twice", 2 * loss, prog_bar=True)
    module.log("number", 3)
    return loss


def episode(
    seed: int = 0, features: tuple[int, ...] = (FEATURES,), examples: int = EXAMPLES, batches: int = 2
) -> Episode:
    """Return an episode of inner batches and an outer one."""
    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        x, y = (
            torch.randn(examples, *features, generator=generator),
            torch.randint(CLASSES, (examples,), generator=generator),
        )
        return x, y, torch.arange(examples) % EXAMPLES

    return Episode([batch() for _ in range(batches)], batch())


def both(
    module: Weighted, strategy: HypergradientStrategy | None = None, episodes: Any = None
) -> tuple[Hypergradient, Hypergradient]:
    """Return an estimate by compiled steps, and by steps as they are."""
    found = []
    for compiles in (True, False):
        module.compiles_steps = compiles
        found.append(hypergradient(module, strategy or ReverseUnroll(), episodes or episode()))
    module.compiles_steps = True
    return found[0], found[1]


def apart(a: Hypergradient, b: Hypergradient) -> float:
    """Return the relative difference of estimates, of where the runs end, and of buffers."""

    def together(result: Hypergradient) -> Params:
        kept = {"value": result.value, **result.metrics, **result.state.flat(), **result.state.buffers}
        values = {**kept, **{f"gradient of {name}": grad for name, grad in result.grads.items()}}
        return {name: value.double() for name, value in values.items()}

    mine, others = together(a), together(b)
    assert mine.keys() == others.keys()
    return float(tree.norm(tree.sub(mine, others)) / tree.norm(others))
