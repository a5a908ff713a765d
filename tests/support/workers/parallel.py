"""Fits in two real processes, started by Lightning itself: ``python parallel.py FOLDER`` writes what they did.

Every rank writes ``FOLDER/<rank>.pt``: for each case what :func:`fit` returns.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, TensorDataset

from lightning_bilevel import (
    FSLA,
    PZOBO,
    SGD,
    Adam,
    BilevelModule,
    Episode,
    EpisodeLoader,
    FirstOrder,
    ForwardGradient,
    HypergradientMonitor,
    HypergradientSchedule,
    HypergradientStrategy,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
    tree,
)
from lightning_bilevel.directions import Blocks
from tests.support.modules import trainer
from tests.support.tables import ROWS

SEED = 7
STEPS = 3


class Noisy(BilevelModule):
    """Inner net with BatchNorm and dropout under Adam, outer example weights: state of every kind.

    Args:
        plain: an inner step is one of plain descent, and nothing is random.
        trouble: (step, kind): what goes wrong there on rank 1.
    """

    def __init__(self, plain: bool = False, trouble: tuple[int, str] = (-1, ""), **options: Any) -> None:
        super().__init__(**{"inner_steps": 2, **options})
        drop = nn.Identity() if plain else nn.Dropout(0.2)
        # No bias before BatchNorm: its gradient is rounding, which Adam would turn into steps.
        self.net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), drop, nn.Linear(4, 1))
        self.example_weights = nn.Parameter(torch.zeros(16))
        self.plain, self.trouble = plain, trouble
        self.double()

    def inner_parameters(self) -> Any:
        return self.net

    def inner_loss(self, batch: Any) -> Tensor:
        x, y, index = batch
        loss = (self.example_weights[index].sigmoid() * (self.net(x) - y).square().mean(1)).mean()
        return loss * self._factor("inner")

    def outer_loss(self, batch: Any) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean() * self._factor("outer")

    def episodes(self, batch: Any) -> Any:
        return [] if self._in_trouble("episodes") else super().episodes(batch)

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1) if self.plain else Adam(lr=0.05)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.outer_parameters(), lr=0.05)

    def _in_trouble(self, kind: str) -> bool:
        return self._trainer is not None and self.global_rank == 1 and self.trouble == (self.trainer.global_step, kind)

    def _factor(self, level: str) -> float:
        return float("nan") if self._in_trouble(level) else 1.1 if self._in_trouble(f"unequal {level}") else 1.0


class Watch(Callback):
    """Keeps the first batch, its averaged hypergradient, and what was logged."""

    def __init__(self, save: Path | None) -> None:
        self.seen: dict[str, Any] = {"logged": []}
        self.save = save

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen["start"] = tree_map(torch.clone, dict(pl_module.state_dict()))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.setdefault("batch", batch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if "grads" not in self.seen:
            outer = pl_module.functional().levels.outer
            self.seen["grads"] = {name: pl_module.get_parameter(name).grad.clone() for name in outer}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen["logged"].append({name: value.item() for name, value in trainer.callback_metrics.items()})
        if self.save and trainer.global_step == STEPS - 1:
            trainer.save_checkpoint(self.save)


class Case(NamedTuple):
    """One fit.

    Attributes:
        strategy: makes the hypergradient strategy.
        options: of the module.
        parallel: of the Trainer.
        same: whether the ranks build the same layers, with the same seed.
        shuffle: the data.
        monitor: whether a ``HypergradientMonitor`` runs along.
        trainer: options of it.
        several: episodes in a batch.
        num_workers: of the loaders.
    """

    strategy: Callable[[], HypergradientStrategy]
    options: dict[str, Any] = {}  # noqa: RUF012
    parallel: str = "ddp"
    same: bool = True
    shuffle: bool = False
    monitor: bool = False
    trainer: dict[str, Any] = {}  # noqa: RUF012
    several: int = 0
    num_workers: int = 0


def loader(shuffle: bool, several: int = 0, num_workers: int = 0) -> Any:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    y = x.sum(1, keepdim=True).sin()
    if several:
        tasks = [
            Episode([(x[i : i + 4], y[i : i + 4], torch.arange(4))], (x[i : i + 2], y[i : i + 2])) for i in range(12)
        ]
        return DataLoader(tasks, batch_size=several, shuffle=shuffle, collate_fn=list)
    options: dict[str, Any] = {"shuffle": shuffle, "num_workers": num_workers}
    inner = DataLoader(TensorDataset(x, y, torch.arange(16)), batch_size=4, **options)
    outer = DataLoader(TensorDataset(x.flip(0), y.flip(0)), batch_size=2, **options)
    return EpisodeLoader(inner, outer, inner_batches=2)


def fit(
    case: Case, rank: int = 0, save: Path | None = None, ckpt_path: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Run a case, and return what happened: of an error, its type and text.

    Args:
        case: the case.
        rank: of this process.
        save: a checkpoint to write before the last step.
        ckpt_path: one to resume from.
        options: of the Trainer.
    """
    torch.manual_seed(SEED + 1 if ckpt_path else SEED if case.same else SEED + rank)
    module, strategy, watch = Noisy(**case.options), case.strategy(), Watch(save)
    monitors = [HypergradientMonitor(TruncatedReverse(2), every_n_steps=2)] if case.monitor else []
    if case.same and not ckpt_path:
        torch.manual_seed(SEED)
    options = {"max_steps": STEPS, "max_epochs": -1, **case.trainer, **options}
    try:
        running = trainer(strategy, watch, *monitors, **options)
        data = loader(case.shuffle, case.several, case.num_workers)
        running.fit(module, data, ckpt_path=ckpt_path)
        error = None
    except Exception as caught:
        error = (type(caught).__name__, str(caught))
    after = {"module": dict(module.state_dict()), "carried": module.fit_context.state_dict()}
    return {**watch.seen, **after, "error": error}


def _of_row(name: str) -> Case:
    outer = tree.numel({"example_weights": torch.zeros(16)})
    row = ROWS[name]
    steps = row.needs.get("inner_steps", 2)
    plain = {"plain": name == "FSLA", **row.needs}
    return Case(lambda: row.make(steps, outer), plain)


SHARED: dict[str, Callable[[int], HypergradientStrategy]] = {
    "ForwardGradient": lambda b: ForwardGradient(b),
    "ForwardGradient-forward": lambda b: ForwardGradient(b, mode="forward"),
    "ForwardGradient-chunks": lambda b: ForwardGradient(b, chunk_size=2),
    "guided": lambda b: ForwardGradient(b, guide=TruncatedReverse(1)),
    "guided by FSLA": lambda b: ForwardGradient(b, guide=FSLA()),
    "remembering": lambda b: ForwardGradient(b, remember=True),
    "guided, remembering": lambda b: ForwardGradient(b, Blocks(), guide=TruncatedReverse(1), remember=True),
    "PZOBO, remembering": lambda b: PZOBO(b, mu=0.1, remember=True),
    "ZerothOrder, remembering": lambda b: ZerothOrder(b, mu=0.1, remember=True),
    "schedule, remembering": lambda b: HypergradientSchedule(
        [(ForwardGradient(b, remember=True), 2), (PZOBO(b, mu=0.1), None)]
    ),
    "PZOBO": lambda b: PZOBO(b, mu=0.1),  # differences over a small μ magnify rounding
    "ZerothOrder": lambda b: ZerothOrder(b, mu=0.1),
    "ZerothOrder-central": lambda b: ZerothOrder(b, mu=0.1, scheme="central"),
    "schedule": lambda b: HypergradientSchedule([(ForwardGradient(b), 1), (PZOBO(b, mu=0.1), None)]),
}


def _shared(name: str, count: int) -> Case:
    options = {"inner_steps": 1, "plain": True} if "FSLA" in name else {}
    return Case(lambda: SHARED[name](count), options, "ddp_directions", monitor=name == "ForwardGradient")


EVERY = {name: _of_row(name) for name in ROWS}
DIRECTIONS = {
    f"{name} {count}": _shared(name, count)
    for name in SHARED
    for count in ((2, 4, 5) if "guided" in name or "remembering" in name else (1, 4, 5))
    if count == 5 or name in ("ForwardGradient", "guided", "PZOBO", "ZerothOrder")
}
OTHER = {
    "other layers on each rank": Case(ReverseUnroll, {"inner_start": "reset"}, same=False, shuffle=True),
    "fresh layers": Case(ReverseUnroll, {"inner_start": "reinit"}),
    "real steps after virtual ones": Case(ReverseUnroll, {"inner_start": "rollback"}, shuffle=True),
    "schedule of FSLA": Case(
        lambda: HypergradientSchedule([(FSLA(), 2), (FirstOrder(), None)]), {"plain": True, "inner_steps": 1}
    ),
    "other seeds, shared directions": Case(
        lambda: ForwardGradient(3), {"inner_start": "reset"}, "ddp_directions", same=False, shuffle=True
    ),
    "monitored": Case(lambda: ForwardGradient(3), monitor=True),
}
RESUMED = {
    "go on": Case(lambda: ForwardGradient(3), shuffle=True),
    "go on, real steps": Case(ReverseUnroll, {"inner_start": "rollback"}, shuffle=True),
    "go on, FSLA": Case(FSLA, {"plain": True, "inner_steps": 1}, shuffle=True),
    "go on, shared": Case(lambda: ForwardGradient(3), parallel="ddp_directions", shuffle=True),
    "go on, remembering": Case(lambda: ForwardGradient(3, remember=True), shuffle=True),
    "go on, shared and remembering": Case(
        lambda: ForwardGradient(3, guide=TruncatedReverse(1), remember=True), parallel="ddp_directions", shuffle=True
    ),
    "go on, shared and guided": Case(
        lambda: ForwardGradient(3, guide=FSLA()), {"plain": True, "inner_steps": 1}, "ddp_directions", shuffle=True
    ),
}
ACCUMULATE: dict[str, Any] = {"accumulate_grad_batches": 2}
SKIP: dict[str, Any] = {"on_nonfinite": "skip", "trouble": (1, "outer")}
HABITS = {
    f"{name}, {parallel}": Case(lambda: ForwardGradient(3), parallel=parallel, **options)
    for parallel in ("ddp", "ddp_directions")
    for name, options in {
        "accumulate": {"trainer": ACCUMULATE},
        "several episodes": {"several": 3, "options": {"inner_start": "reset"}, "shuffle": True},
        "loader workers": {"num_workers": 2, "shuffle": True},
        "skip": {"options": SKIP, "trainer": {"max_steps": 4}},
    }.items()
} | {
    f"{name}, {kind}, {parallel}": Case(make, parallel=parallel, **options)
    for parallel in ("ddp", "ddp_directions")
    for kind, make in {
        "remembering": lambda: ForwardGradient(3, remember=True),
        "guided and remembering": lambda: ForwardGradient(4, guide=TruncatedReverse(1), remember=True),
    }.items()
    for name, options in {
        "accumulate": {"trainer": ACCUMULATE},
        "several episodes": {"several": 3, "options": {"inner_start": "reset"}, "shuffle": True},
        "skip": {"options": SKIP, "trainer": {"max_steps": 4}},
    }.items()
}
TROUBLE = {
    kind: Case(lambda: ForwardGradient(3), {"trouble": (1, kind)}) for kind in ("inner", "outer", "episodes")
} | {
    "outer, shared": Case(lambda: ForwardGradient(1), {"trouble": (1, "outer")}, "ddp_directions"),
    "unequal outer": Case(lambda: ForwardGradient(3), {"trouble": (1, "unequal outer")}, "ddp_directions"),
    "unequal inner": Case(lambda: PZOBO(1), {"trouble": (2, "unequal inner")}, "ddp_directions"),
}
CASES = {**EVERY, **DIRECTIONS, **OTHER, **TROUBLE, **RESUMED, **HABITS}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        # Lightning starts the other process, which runs this loop too, at the first fit.
        rank, parallel = int(os.environ.get("LOCAL_RANK", 0)), {"strategy": case.parallel, "devices": 2}
        middle = folder / f"{name}.ckpt" if name in RESUMED else None
        found[name] = fit(case, rank, middle, **parallel)
        if middle:
            found[f"{name}, resumed"] = fit(case, rank, ckpt_path=middle, **parallel)
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
