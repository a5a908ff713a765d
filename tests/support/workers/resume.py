"""Fits that are killed and resumed, each in its own process: ``python resume.py FOLDER NUM_WORKERS NAME...``.

For each case ``FOLDER/NAME/whole.pt`` and ``resumed.pt`` hold what :func:`fit` returns. The processes are forked from
one that has imported everything, so that each costs no start.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_bilevel import (
    FSLA,
    EpisodeLoader,
    FirstOrder,
    ForwardGradient,
    ForwardUnroll,
    HypergradientMonitor,
    HypergradientSchedule,
    HypergradientStrategy,
    ReverseUnroll,
    tree,
)
from tests.support.modules import trainer
from tests.support.tables import ROWS
from tests.support.workers.parallel import Noisy

EXAMPLES = 16  # inner ones make 4 batches, outer ones 8: an epoch is 8 steps
STEPS = 11
SAVED = 3  # a checkpoint every so many steps
KILLED = 7  # when so many steps are taken, in the middle of the first epoch: the last checkpoint is one step old


class Case(NamedTuple):
    """One fit: its strategy, options of the module, and whether a monitor runs along."""

    strategy: Callable[[], HypergradientStrategy]
    options: dict[str, Any] = {}  # noqa: RUF012
    monitor: bool = False


def of_row(name: str) -> Case:
    row, steps = ROWS[name], ROWS[name].needs.get("inner_steps", 2)
    outer = tree.numel({"example_weights": torch.empty(EXAMPLES)})
    return Case(lambda: row.make(steps, outer), {"plain": name == "FSLA", **row.needs})


PLAIN = {"plain": True, "inner_steps": 1}
CASES = {name: of_row(name) for name in ROWS} | {
    "reset": Case(lambda: ForwardGradient(2), {"inner_start": "reset"}),
    "reinit": Case(lambda: ForwardGradient(2), {"inner_start": "reinit"}),
    "carried tangents": Case(lambda: ForwardUnroll(warm_start=True)),
    "rollback": Case(lambda: ForwardGradient(2), {"inner_start": "rollback"}),
    "monitored": Case(lambda: ForwardGradient(2), monitor=True),
    "guided by FSLA": Case(lambda: ForwardGradient(2, guide=FSLA()), PLAIN),
    "schedule of FSLA": Case(lambda: HypergradientSchedule([(FSLA(), 5), (FirstOrder(), None)]), PLAIN),
    "schedule": Case(lambda: HypergradientSchedule([(ReverseUnroll(), 7), (ForwardGradient(2), None)])),
}


class Watch(Callback):
    """Keeps what was logged at each step; kills the process at one."""

    def __init__(self, killed: int | None) -> None:
        self.killed, self.logged = killed, {}

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.killed:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.logged[trainer.global_step] = {name: value.item() for name, value in trainer.callback_metrics.items()}


def loader(num_workers: int) -> EpisodeLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 3, generator=generator, dtype=torch.float64)
    y = x.sum(1, keepdim=True).sin()
    options: dict[str, Any] = {"shuffle": True, "num_workers": num_workers}
    inner = DataLoader(TensorDataset(x, y, torch.arange(EXAMPLES)), batch_size=4, **options)
    return EpisodeLoader(inner, DataLoader(TensorDataset(x.flip(0), y.flip(0)), batch_size=2, **options), 2)


def fit(case: Case, num_workers: int, folder: Path, seed: int, killed: int | None = None) -> dict[str, Any]:
    """Fit, from the last checkpoint in ``folder`` if there is one; return all that a resumed fit must agree on."""
    torch.manual_seed(seed)
    module, strategy, watch = Noisy(**case.options), case.strategy(), Watch(killed)
    monitors = [HypergradientMonitor(every_n_steps=2)] if case.monitor else []
    saver = ModelCheckpoint(folder, filename="{step:02d}", save_top_k=-1, every_n_train_steps=SAVED)
    options = {"max_epochs": -1, "max_steps": STEPS, "enable_checkpointing": True}
    running = trainer(strategy, saver, watch, *monitors, **options)
    running.fit(module, loader(num_workers), ckpt_path=max(map(str, folder.glob("*.ckpt")), default=None))
    ended = [
        module.state_dict(),
        running.optimizers[0].state_dict(),
        module.fit_context.state_dict(),
        strategy.state_dict(),
    ]
    return {"ended": ended, "logged": watch.logged}


def apart(action: Callable[[], Any]) -> int:
    """Run in a process of its own and return its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        action()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(folder: Path, num_workers: int, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in names:
        own, case = folder / name, CASES[name]
        (own / "killed").mkdir(parents=True)

        def whole(case: Case = case, own: Path = own) -> None:
            torch.save(fit(case, num_workers, own / "whole", seed=1), own / "whole.pt")

        def resumed(case: Case = case, own: Path = own) -> None:
            torch.save(fit(case, num_workers, own / "killed", seed=2), own / "resumed.pt")

        status = [
            apart(whole),
            apart(lambda case=case, own=own: fit(case, num_workers, own / "killed", seed=1, killed=KILLED)),
            apart(resumed),
        ]
        assert [os.waitstatus_to_exitcode(each) for each in status] == [0, -signal.SIGKILL, 0], (name, status)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
