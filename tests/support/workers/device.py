"""Estimates and fits on a simulated device: ``python device.py FOLDER`` compares them with those on the CPU.

The process prints a line of JSON for each case: its name, and the largest difference or the error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import lightning_bilevel.inner_optimizers as optimizers
from lightning_bilevel import (
    FSLA,
    PES,
    SGD,
    SOBA,
    BilevelModule,
    Episode,
    EpisodeLoader,
    ForwardGradient,
    HypergradientMonitor,
    ImplicitGradient,
    ReverseUnroll,
    audit,
    hypergradient,
    numbered,
)
from lightning_bilevel.directions import Coordinate, Gaussian, Sphere
from lightning_bilevel.linear_solvers import ConjugateGradient, Identity, Nystrom
from tests.support import simulated_device
from tests.support.modules import Maml, listed, parameters, tasks, trainer
from tests.support.seeds import seeded
from tests.support.tables import ROWS

EXAMPLES = 6
NETS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 1)
    ),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)),
        nn.TransformerEncoderLayer(3, 1, 4, 0.1, batch_first=True),
        nn.Flatten(),
        nn.Linear(3, 1),
    ),
}


class Weighted(BilevelModule):
    """Example weights, and a learning rate where the optimizer takes it, are the outer parameters."""

    def __init__(self, net: str = "dense", optimizer: Callable[[Tensor], Any] | None = None, **options: Any) -> None:
        super().__init__(**{"inner_steps": 3, "inner_start": "reset", **options})
        self.net, self.optimizer = NETS[net](), optimizer
        self.example_weights, self.log_lr = nn.Parameter(torch.zeros(EXAMPLES)), nn.Parameter(torch.tensor(-3.0))

    def inner_parameters(self) -> Any:
        return self.net

    def outer_parameters(self) -> Any:
        return [self.example_weights] if self.optimizer is None else [self.example_weights, self.log_lr]

    def inner_loss(self, batch: Any) -> Tensor:
        return (self.example_weights.sigmoid() * (self.net(batch[0]) - batch[1]).square().mean(1)).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.05) if self.optimizer is None else self.optimizer(self.log_lr.exp())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.outer_parameters(), lr=0.05)


def episode() -> Episode:
    generator = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(EXAMPLES, 3, generator=generator, dtype=torch.float64)
        return x, x.sum(1, keepdim=True).sin()

    return Episode([batch(), batch()], batch())


def moved(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.to(simulated_device.NAME) if isinstance(leaf, Tensor) else leaf, value)


def difference(there: Any, here: Any) -> float:
    """Return the largest difference of what the device and the CPU computed; raise if the former is not on it."""
    pairs = list(zip(tree_leaves(there), tree_leaves(here), strict=True))
    for mine, _ in pairs:
        assert mine.device.type == simulated_device.NAME, f"a tensor on {mine.device}"
    return max(float((mine.cpu() - other).abs().max()) for mine, other in pairs)


def estimated(build: Callable[[], BilevelModule], strategy: Callable[[BilevelModule], Any]) -> float:
    here, there = seeded(build).double(), seeded(build).double().to(simulated_device.NAME)
    found = [hypergradient(m, strategy(m), e) for m, e in ((there, moved(episode())), (here, episode()))]
    there_and_here = [(each.value, each.grads, each.state.params) for each in found]
    return difference(*there_and_here)


def fitted(build: Callable[[], BilevelModule], strategy: Callable[[], Any], data: Callable[[], Any]) -> float:
    """Compare a fit on the CPU with one on the device that is saved after two epochs, and resumed."""
    here, first, there = (seeded(build) for _ in range(3))
    trainer(strategy(), max_epochs=4).fit(here, data())
    path, options = Path(sys.argv[1]) / "checkpoint.ckpt", {"strategy": simulated_device.strategy()}
    begun = trainer(strategy(), max_epochs=2, accelerator="auto", **options)
    begun.fit(first, data())
    begun.save_checkpoint(path)
    options["strategy"] = simulated_device.strategy()
    resumed = trainer(strategy(), HypergradientMonitor(), max_epochs=4, accelerator="auto", **options)
    resumed.fit(there, data(), ckpt_path=path)
    pairs = [parameters(module) for module in (there, here)]
    return max(float((pairs[0][name] - value).abs().max()) for name, value in pairs[1].items())


def mixed() -> float:
    return float((torch.ones(2, device=simulated_device.NAME) + torch.ones(2)).sum())


def drawn_elsewhere() -> float:
    return float(torch.rand(2, device=simulated_device.NAME, generator=torch.Generator()).sum())


def audited() -> float:
    module = seeded(Weighted).double().to(simulated_device.NAME)
    rows = audit(module, moved(episode())).rows
    broken = [row.strategy for row in rows if row.works == "no"]
    assert not broken, broken
    return 0.0


def cases() -> Iterator[tuple[str, Callable[[], float]]]:
    yield "mixed", mixed
    yield "drawn elsewhere", drawn_elsewhere
    for name, row in ROWS.items():
        build = lambda row=row: Weighted(**row.needs)  # noqa: E731
        yield f"estimate, {name}", lambda build=build, row=row: estimated(build, row.build)
    for net in ("convolutions", "attention"):
        for name in ("ReverseUnroll-sqrt", "ForwardGradient", "ForwardGradient-N-forward"):
            build = lambda net=net: Weighted(net)  # noqa: E731
            yield f"estimate, {name}, {net}", lambda build=build, name=name: estimated(build, ROWS[name].build)
    for optimizer in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad"):
        kind = getattr(optimizers, optimizer)
        build = lambda kind=kind: Weighted(optimizer=lambda lr: kind(lr=lr))  # noqa: E731
        yield f"estimate, learned {optimizer}", lambda build=build: estimated(build, lambda _: ReverseUnroll())
    for solver in (ConjugateGradient(), Identity(), Nystrom(rank=2)):
        name = f"estimate, {type(solver).__name__}"
        yield name, lambda solver=solver: estimated(Weighted, lambda _: ImplicitGradient(solver))
    for sampler in (Gaussian(), Sphere(), Coordinate()):
        name = f"estimate, {type(sampler).__name__}"
        yield name, lambda sampler=sampler: estimated(Weighted, lambda _: ForwardGradient(2, sampler))
    episodes = lambda: listed([tree_map(Tensor.float, episode())])  # noqa: E731
    for start in ("warm", "reset", "reinit"):
        build = lambda start=start: Weighted("dense", lambda lr: SGD(lr=lr, momentum=0.9), inner_start=start)  # noqa: E731
        for strategy in (ReverseUnroll, ForwardGradient):
            name = f"fit, {strategy.__name__}, {start}"
            yield name, lambda build=build, strategy=strategy: fitted(build, strategy, episodes)
    single = lambda: Weighted(inner_start="warm", inner_steps=1)  # noqa: E731
    yield "fit, FSLA", lambda: fitted(single, FSLA, episodes)
    rows = numbered([tree_map(Tensor.float, batch) for batch in (*episode().inner, episode().outer)])
    table = lambda: fitted(single, lambda: SOBA(momentum="table"), lambda: EpisodeLoader(rows, rows[:2]))  # noqa: E731
    yield "fit, SOBA-table", table
    yield "fit, PES", lambda: fitted(lambda: Weighted(inner_start="warm"), lambda: PES(2), episodes)
    yield "fit, tasks", lambda: fitted(Maml, ReverseUnroll, lambda: listed([tasks(3)]))
    yield "audit", audited


def main() -> None:
    simulated_device.register(Path(sys.argv[1]))
    for name, run in cases():
        try:
            found: Any = run()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        print(json.dumps([name, found]), flush=True)


if __name__ == "__main__":
    main()
