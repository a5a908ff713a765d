"""The audit says which strategies work on a module, names the operation where one does not, and leaves no trace."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_bilevel import (
    PZOBO,
    SGD,
    BilevelModule,
    Episode,
    FirstOrder,
    ForwardGradient,
    HypergradientSchedule,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    StrategyAudit,
    TruncatedReverse,
    audit,
    bilevel,
    hypergradient,
)
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Neumann
from tests.support.audits import EPISODE, FORWARD, PERTURBED, SECOND_ORDER, Broken, Net, distances, failing, line, quiet
from tests.support.functions import Detached
from tests.support.modules import (
    Calls,
    Cleaning,
    Maml,
    NoLevels,
    differing,
    examples,
    identical,
    listed,
    loader,
    parameters,
    tasks,
    trainer,
)
from tests.support.problems import RidgeBlackBox, RidgeSolver
from tests.support.seeds import seeded

# --- What works ---


def test_a_module_on_which_everything_works(capsys: pytest.CaptureFixture[str]) -> None:
    module = Cleaning(inner_steps=100, optimizer=lambda lr: SGD(lr=lr))
    report = audit(module, Episode([examples(0)], examples(1)[:2]))
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert printed.startswith("Audit of `Cleaning`: every strategy took 2 of 100 inner steps.")
    verdicts = {row.strategy.partition("(")[0]: row.verdict for row in report.rows}
    assert verdicts == {
        **dict.fromkeys([*SECOND_ORDER, "GammaGreedy", "DARTS", *PERTURBED], "yes"),
        "FirstOrder": "zero",
        **dict.fromkeys(["ImplicitGradient", "PenaltyGradient", "EvoGrad"], "refused"),  # the learning rate is learned
        **dict.fromkeys(["SOBA", "BOME", "MEHA"], "refused"),  # θ does not go on
        "FSLA": "refused",
    }
    assert report[FORWARD].works
    assert report["ReverseUnroll"].cosine == pytest.approx(1)
    assert report["ForwardUnroll"].cosine == pytest.approx(1)
    assert report[FORWARD].cosine is None
    assert all((row.seconds is not None) == (row.verdict != "refused") for row in report.rows)
    assert report.vectorizes
    assert "can be vectorized over episodes." in printed
    assert "look" not in report["ReverseUnroll"].advice
    assert "`HypergradientMonitor` shows the cosine at 100" in printed.replace("\n", " ")
    assert repr(report) == "<Audit of Cleaning: 10 of 18 strategies work>"
    assert max(map(len, printed.splitlines())) <= 124


def test_shared_parameters_and_several_episodes() -> None:
    report = quiet(Maml(inner_steps=4), tasks(3))
    assert report["FirstOrder"].works
    assert 0.5 < report["FirstOrder"].cosine < 1
    assert report["ReverseUnroll"].works
    assert report["ImplicitGradient"].verdict == "refused"
    assert report["ImplicitGradient"].reason.startswith(
        "parameters shared by both levels and `proximal=0`: the minimum"
    )
    # In a batch of several, F.mse_loss is a mean over each episode.
    assert report.vectorizes


def test_solvers() -> None:
    module = RidgeSolver()
    report = quiet(module, module.episode())
    for exact in ("ReverseUnroll", "TruncatedReverse", "GammaGreedy"):
        assert (report[exact].verdict, report[exact].cosine) == ("yes", pytest.approx(1))  # a run of one step
    assert report["FSLA"].reason.startswith("`solve_inner`: your solver has no inner steps")
    assert "Episodes" not in str(report)
    assert "`solve_inner` takes one" in str(report)
    assert report.vectorizes is None
    module = RidgeBlackBox()
    report = quiet(module, module.episode())
    assert report["ReverseUnroll"].verdict == "refused"
    assert report["PZOBO"].works
    assert report["ZerothOrder"].works


def test_a_wrapped_module() -> None:
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.penalty = seeded(lambda: nn.Linear(3, 1)), nn.Parameter(torch.zeros(3))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = (self.net(batch[0]) - batch[1]).square().mean() + (self.penalty.exp() * self.net.weight**2).sum()
            self.log("loss", loss)
            return loss

    def validation_loss(module: Any, batch: Any) -> Tensor:
        return (module.net(batch[0]) - batch[1]).square().mean()

    levels = {"inner": "net.*", "outer": "penalty", "outer_loss": validation_loss}
    module = bilevel(Plain(), **levels, inner_optimizer=SGD(lr=0.1), inner_start="reset")
    report = quiet(module)
    assert report["ReverseUnroll"].works
    assert report[FORWARD].works


# --- Nothing changes ---


class Noisy(Cleaning):
    """Draws from every generator, keeps statistics, logs and counts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            net=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.4), nn.Tanh(), nn.Linear(4, 1)),
            **options,
        )
        self.mean = MeanMetric()

    def inner_loss(self, batch: Any) -> Tensor:
        loss = super().inner_loss(batch)
        self.log("inner", loss)
        self.mean.update(loss.detach())
        return loss * (1 + 1e-3 * random.random() + 1e-3 * np.random.rand())


def test_nothing_in_the_module_changes() -> None:
    module = seeded(Noisy)
    module.example_weights.grad = torch.ones(8)
    module.net[2].eval()
    tensors, flags = parameters(module), [p.requires_grad for p in module.parameters()]
    modes = [child.training for child in module.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    attributes = set(vars(module))
    report = quiet(module, Episode([examples(0)], examples(1)[:2]))
    assert any(row.works for row in report.rows)
    assert differing(tensors, parameters(module)) == []
    assert flags == [p.requires_grad for p in module.parameters()]
    assert modes == [child.training for child in module.modules()]
    assert torch.equal(module.example_weights.grad, torch.ones(8))
    assert [name for name, p in module.named_parameters() if p.grad is not None] == ["example_weights"]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])
    assert set(vars(module)) == attributes
    assert module.mean._update_count == 0
    assert not torch.is_anomaly_enabled()


def test_an_audit_repeats_itself() -> None:
    module, batch = seeded(Noisy), Episode([examples(0)], examples(1)[:2])
    one, other = ([(r.verdict, r.cosine) for r in quiet(module, batch).rows] for _ in range(2))
    assert one == other


def test_what_an_audit_meets_is_said_again_where_it_matters() -> None:
    module = Net(lambda x: 2 * x if x.sum().item() > 0 else 3 * x)
    assert quiet(module, EPISODE, [PZOBO(2)])["PZOBO"].works
    with pytest.warns(UserWarning, match=r"^The losses cannot be vectorized over directions"):
        hypergradient(module, PZOBO(2, mu=0.1), EPISODE)


class Final(Callback):
    """Keeps what a fit leads to."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.generators = torch.get_rng_state(), random.getstate(), list(np.random.get_state()[1])
        self.tensors, self.metrics = parameters(pl_module), dict(trainer.callback_metrics)
        self.inner = pl_module.fit_context.state_dict()


def fit(strategy: HypergradientStrategy, *callbacks: Callback, batches: Any = None, **options: Any) -> Final:
    final = Final()
    module = seeded(lambda: Noisy(**options))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        trainer(*callbacks, strategy, final).fit(module, batches or loader(shuffle=True))
    return final


@pytest.mark.parametrize(
    "make",
    [
        ReverseUnroll,
        lambda: ForwardGradient(3, guide=TruncatedReverse(1)),
        lambda: PZOBO(2, mu=0.1),
        lambda: HypergradientSchedule([(ForwardGradient(2), 2), (ReverseUnroll(), None)]),
    ],
    ids=["ReverseUnroll", "guided", "PZOBO", "schedule"],
)
def test_a_fit_is_the_same_bit_for_bit(make: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> None:
    plain, audited = fit(make()), fit(make(), StrategyAudit())
    assert differing(plain.tensors, audited.tensors) == []
    assert identical(plain.generators, audited.generators)
    assert identical(plain.metrics, audited.metrics)
    assert identical(plain.inner, audited.inner)
    assert capsys.readouterr().out.count("Audit of `Noisy`") == 1


# --- The callback ---


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_its_place_among_the_callbacks_does_not_matter(first: bool, capsys: pytest.CaptureFixture[str]) -> None:
    spy, module = StrategyAudit(), seeded(Cleaning)
    callbacks = [spy, TruncatedReverse(2)] if first else [TruncatedReverse(2), spy]
    trainer(*callbacks, max_epochs=2).fit(module, loader())
    printed = capsys.readouterr().out
    assert printed.count("Audit of `Cleaning`") == 1
    assert "This fit runs `TruncatedReverse(steps=2)`." in printed
    names = [row.strategy for row in spy.report.rows]
    assert names[0] == "TruncatedReverse(steps=2)"
    assert "TruncatedReverse()" not in names
    assert len(names) == 18


def test_a_second_fit_is_audited_anew(capsys: pytest.CaptureFixture[str]) -> None:
    spy, module = StrategyAudit([FirstOrder()]), seeded(Cleaning)
    for _ in range(2):
        trainer(spy, ReverseUnroll(), max_steps=1).fit(module, loader())
    assert capsys.readouterr().out.count("Audit of") == 2
    assert [row.strategy for row in spy.report.rows] == ["ReverseUnroll()", "FirstOrder()"]


def test_a_fit_whose_strategy_does_not_work_stops() -> None:
    steps, module = Calls(type), Net(distances)
    flags = [p.requires_grad for p in module.parameters()]
    message = (
        r"^`ReverseUnroll\(\)` does not work on `Net`\. This is because `cdist` has no second derivative "
        rf"\({line(distances)}\)\. Write `cdist` with .*\nWhat works here: PenaltyGradient\(\), DARTS\(\), EvoGrad\("
    )
    with pytest.raises(MisconfigurationError, match=message):
        trainer(ReverseUnroll(), StrategyAudit(), steps).fit(module, listed([EPISODE]))
    assert len(steps.seen) == 0
    assert [p.requires_grad for p in module.parameters()] == flags


def test_a_fit_whose_strategy_works_goes_on_whatever_else_fails() -> None:
    steps = Calls(type)
    trainer(PZOBO(3), StrategyAudit(), steps).fit(Net(distances), listed([EPISODE] * 2))
    assert len(steps.seen) == 2


def test_a_fit_whose_strategy_is_doubtful_goes_on_with_a_warning() -> None:
    steps = Calls(type)
    doubtful = pytest.warns(
        UserWarning, match=r"^`ReverseUnroll\(\)` may be wrong on `Net`: it disagrees with a finite"
    )
    with doubtful, pytest.warns(UserWarning, match=r"^The first hypergradient is exactly zero"):
        trainer(ReverseUnroll(), StrategyAudit([FirstOrder()]), steps).fit(Net(Detached.apply), listed([EPISODE]))
    assert len(steps.seen) == 1


def test_a_running_strategy_that_is_broken_stops_the_fit() -> None:
    with pytest.raises(MisconfigurationError, match=r"^`Broken\(\)` does not work on `Net`\. This is because Runtime"):
        trainer(Broken(), StrategyAudit([Broken()])).fit(Net(), listed([EPISODE]))


TWO_PROCESSES = """
import sys
import pytorch_lightning as pl
import torch
from lightning_bilevel import ForwardGradient, ReverseUnroll, StrategyAudit
from tests.support.modules import Cleaning, loader

torch.manual_seed(0)
quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
quiet |= {"strategy": sys.argv[1], "accelerator": "cpu", "devices": 2, "max_epochs": 1}
spy, module = StrategyAudit([ReverseUnroll()]), Cleaning(inner_start="reset")
strategy = ReverseUnroll() if sys.argv[1] == "ddp" else ForwardGradient(2)
trainer = pl.Trainer(callbacks=[spy, strategy], **quiet)
trainer.fit(module, loader())
assert spy.report is not None
everywhere = trainer.strategy.all_gather(module.example_weights.detach())
assert torch.equal(everywhere[0], everywhere[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_directions"])
def test_two_processes_print_once(strategy: str, tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "MASTER_", "LOCAL_"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), strategy],
        env={**keep, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Audit of `Cleaning`") == 1


def test_a_fit_stops_in_every_process_if_it_does_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    running = trainer(ReverseUnroll(), StrategyAudit([FirstOrder()]))
    monkeypatch.setattr(running.strategy, "reduce_boolean_decision", lambda decision: False)
    with pytest.raises(MisconfigurationError, match="^The strategy of this fit does not work on the first batch of an"):
        running.fit(Net(), listed([EPISODE]))


def test_mixed_precision_is_that_of_the_fit() -> None:
    seen = []

    class Cast(Net):
        def error(self, batch: Any) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().error(batch)

    spy = StrategyAudit()
    trainer(ReverseUnroll(), spy, precision="bf16-mixed").fit(Cast(), listed([EPISODE]))
    assert set(seen) == {True}
    assert spy.report["ReverseUnroll"].works


def test_during_a_fit_warm_state_is_seen_and_kept() -> None:
    reports = []

    class Midway(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            before = copy.deepcopy(pl_module.fit_context.state_dict())
            reports.append(quiet(pl_module, batch))
            assert identical(before, pl_module.fit_context.state_dict())

    trainer(ReverseUnroll(), Midway()).fit(seeded(Cleaning), loader())
    assert len(reports) == 4
    assert all(report["ReverseUnroll"].works for report in reports)


# --- Devices ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    module = Net().to("cuda")
    report = quiet(module)
    assert failing(report) == set()
    assert {p.device.type for p in module.parameters()} == {"cuda"}


# --- Misuse ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (nn.Linear(1, 1), EPISODE),
            MisconfigurationError,
            "^`Linear` has no inner and outer level. `audit` works on a",
        ),
        ((BilevelModule(), EPISODE), MisconfigurationError, "^`BilevelModule` has no `inner_parameters`"),
        ((Net(), 3), ValueError, "^Expected `the training batch` to be an `Episode`, a list of them, or a mapping"),
        ((Net(), EPISODE, []), ValueError, r"^Expected `audit\(strategies=\.\.\.\)` to be a list such as"),
        ((Net(), EPISODE, ReverseUnroll()), ValueError, r"^Expected `audit\(strategies=\.\.\.\)` to be a list such as"),
        (
            (Net(), EPISODE, [ReverseUnroll]),
            ValueError,
            r"^Expected `audit\(strategies=\.\.\.\)` to be a list of hyperg",
        ),
    ],
    ids=["module", "hooks", "batch", "empty", "single", "class"],
)
def test_misuse(arguments: Sequence[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        audit(*arguments)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_bad_steps(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"^Expected `audit\(steps=\.\.\.\)` to be a positive integer, got"):
        audit(Net(), EPISODE, steps=steps)
    with pytest.raises(ValueError, match=r"^Expected `StrategyAudit\(steps=\.\.\.\)` to be a positive integer, got"):
        StrategyAudit(steps=steps)


def test_a_batch_without_episodes() -> None:
    class Empty(Net):
        def episodes(self, batch: Any) -> list[Episode]:
            return []

    with pytest.raises(ValueError, match=r"^Expected `audit\(batch=\.\.\.\)` to be at least one episode, got"):
        audit(Empty(), EPISODE)


def test_bad_strategies_of_the_callback() -> None:
    with pytest.raises(
        ValueError, match=r"^Expected `StrategyAudit\(strategies=\.\.\.\)` to be a list of hypergradient"
    ):
        StrategyAudit([Callback()])


def test_a_plain_module_has_nothing_to_audit() -> None:
    message = "^`NoLevels` has no inner and outer level. `StrategyAudit` works on"
    with pytest.raises(MisconfigurationError, match=message):
        trainer(StrategyAudit()).fit(NoLevels(), listed([EPISODE]))


def test_a_row_by_name() -> None:
    report = quiet(Net(), EPISODE, [ReverseUnroll(), ImplicitGradient(Neumann(2, step_size=0.1))])
    assert report["ImplicitGradient"] is report["ImplicitGradient(Neumann(...))"]
    with pytest.raises(KeyError, match="FSLA is not among"):
        report["FSLA"]


def test_one_step_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    audit(Net(inner_steps=1), EPISODE, [ReverseUnroll()])
    printed = capsys.readouterr().out
    assert printed.startswith("Audit of `Net`: every strategy took 1 inner step.")
    assert "HypergradientMonitor" not in printed
