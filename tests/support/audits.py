"""What the tests of the audit share: a module with an operation of choice, and a silent audit of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, Episode, HypergradientStrategy, audit
from lightning_bilevel.auditing import Audit
from tests.support.modules import examples
from tests.support.seeds import seeded

SECOND_ORDER = ("ReverseUnroll", "TruncatedReverse", "ForwardUnroll", "ForwardGradient", "ImplicitGradient")
FORWARD = "ForwardGradient(mode='forward')"
PERTURBED = ("PES", "PZOBO", "ZerothOrder")


class Net(BilevelModule):
    """Example weights and a net, with an operation on the net's output.

    Args:
        act: the operation, in both losses.
        options: of ``BilevelModule``.
    """

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.tanh, net: nn.Module | None = None, **options: Any):
        super().__init__(**{"inner_steps": 50, "inner_start": "reset", **options})
        self.net = net or seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
        self.weights = nn.Parameter(torch.zeros(8))
        self.act = act

    def inner_parameters(self) -> Any:
        return self.net.parameters()

    def inner_loss(self, batch: Any) -> Tensor:
        return (self.weights.sigmoid() * self.error(batch)).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return self.error(batch).mean()

    def error(self, batch: Any) -> Tensor:
        return (self.act(self.net(batch[0])) - batch[1]).square().mean(1)

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.outer_parameters(), lr=0.1)


EPISODE = Episode([examples(0)[:2]], examples(1)[:2])


def quiet(module: BilevelModule, batch: Any = EPISODE, *args: Any, **options: Any) -> Audit:
    return audit(module, batch, *args, verbose=False, **options)


def distances(x: Tensor) -> Tensor:
    return torch.cdist(x, x)  # here: distances


def line(function: Callable[..., Any]) -> str:
    """Return where the remark with a function's name stands."""
    path = Path(inspect.getfile(function))
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    numbers = [number for number, text in lines if text.endswith(f"# here: {function.__name__}")]
    return f"{path.name}:{numbers[0]}"


def failing(report: Audit) -> set[str]:
    names = {
        row.strategy.partition("(")[0] if row.strategy != FORWARD else FORWARD for row in report.rows if row.reason
    }
    return names - {"FirstOrder", "FSLA", "SOBA", "BOME", "MEHA"}


class Broken(HypergradientStrategy):
    """A strategy that does not work."""

    exact = unbiased = False
    differentiates = frozenset()
    memory = cost = "none"

    def estimate(self, *args: Any) -> Any:
        raise RuntimeError("the widget is missing\nand more")
