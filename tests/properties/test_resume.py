"""A fit that was killed goes on, from its last checkpoint, as if nothing had happened: bit for bit.

And checkpoints that a fit cannot go on from say why.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bilevel import SGD, Adam, FirstOrder, HypergradientSchedule, ReverseUnroll
from lightning_bilevel.errors import MisconfigurationError
from tests.support.modules import Cleaning, identical, loader, trainer
from tests.support.processes import ran
from tests.support.workers.resume import CASES, KILLED, SAVED, STEPS

WITH_WORKERS = ("ReverseUnroll", "ForwardGradient", "FSLA", "schedule")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the fits are forked from one process")


def killed_and_resumed(folder: Path, num_workers: int, names: Iterable[str]) -> Path:
    ran("resume.py", folder, num_workers, *names)
    return folder


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed_and_resumed(tmp_path_factory.mktemp("fits"), 0, CASES)


@pytest.fixture(scope="module")
def fits_with_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed_and_resumed(tmp_path_factory.mktemp("fits"), 2, WITH_WORKERS)


def assert_resumed_exactly(folder: Path) -> None:
    whole, resumed = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("whole", "resumed"))
    saved = KILLED // SAVED * SAVED
    assert list(resumed["logged"]) == list(range(saved + 1, STEPS + 1))
    assert list(whole["logged"]) == list(range(1, STEPS + 1))
    assert identical(resumed["ended"], whole["ended"])
    for step, logged in resumed["logged"].items():
        before = whole["logged"][step]
        assert {name: before[name] for name in logged} == logged
        # Lightning shows the last value of what an earlier phase has logged, and a resumed run has none.
        assert before.keys() - logged.keys() <= {"inner_residual"}
    assert len({values["outer_loss"] for values in whole["logged"].values()}) == STEPS  # every step counts


@pytest.mark.parametrize("name", CASES)
def test_killed_in_the_middle_of_an_epoch(fits, name):
    assert_resumed_exactly(fits / name)


@pytest.mark.parametrize("name", WITH_WORKERS)
def test_killed_with_loader_workers(fits_with_workers, name):
    assert_resumed_exactly(fits_with_workers / name)


@pytest.mark.slow
def test_every_case_killed_with_loader_workers(tmp_path):
    rest = [name for name in CASES if name not in WITH_WORKERS]
    folder = killed_and_resumed(tmp_path, 2, rest)
    for name in rest:
        assert_resumed_exactly(folder / name)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints that cannot be resumed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the checkpoint of a warm start with momentum under a schedule of two phases."""
    fit = trainer(HypergradientSchedule([(ReverseUnroll(), 1), (FirstOrder(), None)]), max_steps=2)
    fit.fit(Cleaning(), loader())
    fit.save_checkpoint(tmp_path / "saved.ckpt")
    return tmp_path / "saved.ckpt"


def resume(path: Path, module: Any = None, strategy: Any = None) -> None:
    strategy = strategy or HypergradientSchedule([(ReverseUnroll(), 1), (FirstOrder(), None)])
    trainer(strategy, max_steps=4, max_epochs=-1).fit(module or Cleaning(), loader(), ckpt_path=path)


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint["lightning_bilevel"])
        torch.save(checkpoint, path)

    return edit


BEGIN_ANEW = r"or begin anew from its weights: `module\.load_state_dict\(torch\.load\(path\)\['state_dict'\]\)`\."
UNUSABLE: dict[str, tuple[Callable[[Path], Any], type[Exception] | tuple[type[Exception], ...], str]] = {
    "cut off": (
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        RuntimeError,
        r"Cannot read the checkpoint .*saved\.ckpt: it is cut off, or no checkpoint\. .* Resume from an earlier one\.",
    ),
    "empty": (lambda path: path.write_bytes(b""), EOFError, r"Cannot read the checkpoint .*saved\.ckpt: it is cut off"),
    "no checkpoint": (
        lambda path: path.write_text("a: 1"),
        (IndexError, pickle.UnpicklingError),  # it depends on Lightning's version how `torch.load` is called
        r"Cannot read the checkpoint .*saved\.ckpt: it is cut off",
    ),
    "older": (
        edited(lambda state: state.pop("format")),
        MisconfigurationError,
        r"Cannot use this checkpoint\. This is because its inner state has the format none, .* reads 2\. .*"
        + BEGIN_ANEW,
    ),
    "newer": (edited(lambda state: state.update(format=99)), MisconfigurationError, r".*has the format 99, and this"),
    "incomplete": (
        edited(lambda state: state.pop("opt_state")),
        MisconfigurationError,
        r"its inner state lacks \['opt_state'\]",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_checkpoint_says_so(saved, name):
    spoil, kind, message = UNUSABLE[name]
    spoil(saved)
    with pytest.raises(kind, match=message):
        resume(saved)


OTHER: dict[str, tuple[Any, Any, str]] = {
    "start": (
        lambda: Cleaning(inner_start="reset"),
        None,
        r"Cannot use `inner_start='reset'` with this checkpoint\. This is because its fit ran with 'warm'\. .*"
        + BEGIN_ANEW,
    ),
    "inner optimizer": (
        lambda: Cleaning(optimizer=lambda lr: Adam(lr=lr)),
        None,
        r"Cannot use this inner optimizer with this checkpoint\. This is because the one of its fit kept "
        r"\['momentum'\] for 4 parameters, and this one keeps \['exp_avg', 'exp_avg_sq'\] for 4 parameters\.",
    ),
    "stateless inner optimizer": (
        lambda: Cleaning(optimizer=lambda lr: SGD(lr=lr)),
        None,
        r"Cannot use this inner optimizer with this checkpoint\. .* keeps nothing\.",
    ),
    "phases": (
        Cleaning,
        lambda: HypergradientSchedule([(ReverseUnroll(), None)]),
        r"Cannot use a `HypergradientSchedule` of 1 phases .*This is because it was written with 2",
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_checkpoint_of_another_kind_of_fit_is_refused(saved, name):
    module, strategy, message = OTHER[name]
    with pytest.raises(MisconfigurationError, match=message):
        resume(saved, module(), strategy and strategy())


def test_the_checkpoint_of_these_tests_can_be_resumed(saved):
    resume(saved)
