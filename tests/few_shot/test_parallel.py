"""Tasks in two processes. The test runs this file as a script, which Lightning starts a second time."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from lightning_bilevel import FirstOrder, ForwardGradient
from lightning_bilevel.few_shot import TaskLoader
from tests.support.fits import SaveAt
from tests.support.processes import ran
from tests.support.tasks import Numbers, fit

STRATEGIES = {"ddp": FirstOrder, "ddp_directions": lambda: ForwardGradient(num_directions=2)}


def loader(num_workers: int = 0) -> TaskLoader:
    return TaskLoader(Numbers(8, seed=3), batch_size=2, num_workers=num_workers)


def work(folder: Path) -> None:
    """Fit under every strategy, whole and resumed; write what this rank saw."""
    for name, strategy in STRATEGIES.items():
        path, parallel = folder / f"{name}.ckpt", {"strategy": name, "devices": 2, "max_epochs": 2}
        whole = fit(loader(1), callbacks=[SaveAt(path, 3, "on_train_batch_end")], hypergradient=strategy(), **parallel)
        os.environ["PL_GLOBAL_SEED"] = "5"  # by which Lightning would shuffle
        rest = fit(loader(), ckpt_path=path, hypergradient=strategy(), **parallel)
        seen = {"whole": whole.seen, "rest": rest.seen}
        (folder / f"{name}_{os.environ.get('LOCAL_RANK', 0)}.json").write_text(json.dumps(seen))
        del os.environ["PL_GLOBAL_SEED"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    ran(__file__, folder)
    return folder


def seen(folder: Path, name: str) -> list[dict[str, list[list[float]]]]:
    return [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in (0, 1)]


def test_ddp_shares_tasks_out(folder: Path) -> None:
    """Of 8 tasks in an epoch, rank 0 has 0, 2, 4, 6 and rank 1 the others."""
    tasks = Numbers(8, seed=3)
    for rank, each in enumerate(seen(folder, "ddp")):
        expected = [
            [float(tasks[epoch, index].outer) for index in (first + rank, first + rank + 2)]
            for epoch in (0, 1)
            for first in (0, 4)
        ]
        assert each["whole"] == expected
        assert each["rest"] == expected[3:]


def test_ddp_directions_gives_all_the_same(folder: Path) -> None:
    tasks = Numbers(8, seed=3)
    expected = [[float(tasks[e, i + j].outer) for j in (0, 1)] for e in (0, 1) for i in range(0, 8, 2)]
    for each in seen(folder, "ddp_directions"):
        assert each["whole"] == expected
        assert each["rest"] == expected[3:]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
