"""Schedules of strategies and the monitor of their quality, in a real Trainer; the table of facts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from torch import Tensor, nn

from lightning_bilevel import (
    FSLA,
    PZOBO,
    Episode,
    FirstOrder,
    ForwardGradient,
    Hypergradient,
    HypergradientMonitor,
    HypergradientSchedule,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
    hypergradient,
    strategies,
    tree,
)
from lightning_bilevel.directions import Gaussian
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Dense, Identity
from lightning_bilevel.problem import InnerState
from lightning_bilevel.strategies.table import Facts, facts, markdown
from lightning_bilevel.tree import Params
from tests.support.modules import differing, listed, parameters, trainer
from tests.support.problems import Mlp, Quadratic, RidgeBlackBox, RidgeSolver, assert_close, episodes, seeded


class Fit(Mlp):
    """Something to fit, in float64."""

    def __init__(self, dropout: float = 0.0, **options: Any) -> None:
        super().__init__("momentum", inner_start="warm", **options)
        if dropout:
            self.net.first.register_forward_hook(lambda module, inputs, output: nn.functional.dropout(output, dropout))

    def configure_optimizers(self):
        return torch.optim.SGD(self.outer_parameters(), lr=0.3)


EPISODES = episodes(6)


class Before(Callback):
    """Calls a function of (module, episode) before every training step, and reads the metrics after it."""

    def __init__(self, call: Callable[[Any, Episode], Any] = lambda module, episode: None) -> None:
        self.call, self.values, self.metrics = call, [], []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Episode, batch_idx: int) -> None:
        self.values.append(self.call(pl_module, batch))

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.metrics.append({name: value.clone() for name, value in trainer.callback_metrics.items()})

    def logged(self, name: str) -> list[float]:
        return [metrics[name].item() for metrics in self.metrics]


def fit(strategy: HypergradientStrategy, *callbacks: Callback, module: Any = None, **options: Any) -> Any:
    """Fit and return the trainer; its module is ``trainer.lightning_module``."""
    running = trainer(strategy, *callbacks, **{k: v for k, v in options.items() if k != "ckpt_path"})
    with seeded(1):
        running.fit(module or Fit(), listed(EPISODES), ckpt_path=options.get("ckpt_path"))
    return running


# --- Schedules ---

PHASES = [(TruncatedReverse(1), 1), (ReverseUnroll(), 1), (FirstOrder(), None)]


def test_phases_go_by_optimizer_steps() -> None:
    def norms(module: Any, episode: Episode) -> list[float]:
        return [tree.norm(hypergradient(module, strategy, episode).grads).item() for strategy, _ in PHASES]

    before = Before(norms)
    fit(HypergradientSchedule(PHASES), before, accumulate_grad_batches=2)
    phases = [0, 0, 1, 1, 2, 2]
    assert before.logged("hypergradient_phase") == phases
    expected = [norms[phase] for norms, phase in zip(before.values, phases, strict=True)]
    assert before.logged("hypergradient_norm") == pytest.approx(expected, rel=1e-12)
    assert len({round(norm, 9) for norm in before.values[0]}) == 3  # the phases differ


def test_a_resumed_fit_goes_on_in_its_phase(tmp_path: Path) -> None:
    def schedule() -> HypergradientSchedule:
        return HypergradientSchedule([(TruncatedReverse(1), 4), (ForwardGradient(2), None)])

    whole, resumed = Before(), Before()
    expected = parameters(fit(schedule(), whole, accumulate_grad_batches=2, max_epochs=2).lightning_module)
    fit(schedule(), accumulate_grad_batches=2).save_checkpoint(tmp_path / "middle.ckpt")
    options = {"accumulate_grad_batches": 2, "max_epochs": 2, "ckpt_path": tmp_path / "middle.ckpt"}
    actual = parameters(fit(schedule(), resumed, **options).lightning_module)
    assert whole.logged("hypergradient_phase") == [0] * 8 + [1] * 4
    assert resumed.logged("hypergradient_phase") == [0] * 2 + [1] * 4
    assert differing(actual, expected) == []


def test_phase_of_a_step() -> None:
    schedule = HypergradientSchedule([(FirstOrder(), 2), (FirstOrder(), 3), (FirstOrder(), None)])
    assert [schedule.phase(step) for step in (0, 1, 2, 4, 5, 10**9)] == [0, 0, 1, 1, 2, 2]
    assert HypergradientSchedule([(FirstOrder(), None)]).phase(0) == 0


def test_a_single_estimate_is_that_of_the_first_phase() -> None:
    module, (episode,) = Mlp(), episodes(1)
    result = hypergradient(module, HypergradientSchedule(PHASES), episode)
    assert_close(result.grads, hypergradient(module, TruncatedReverse(1), episode).grads, 1e-15)
    assert result.metrics["hypergradient_phase"] == 0


def test_facts_of_a_schedule_are_what_is_true_of_all_phases() -> None:
    def facts_of(*members: HypergradientStrategy) -> tuple[bool, ...]:
        schedule = HypergradientSchedule([*((member, 1) for member in members[:-1]), (members[-1], None)])
        return schedule.exact, schedule.unbiased, schedule.second_order, schedule.direction_parallel, schedule.stacks

    assert facts_of(ReverseUnroll()) == (True, True, True, False, True)
    assert facts_of(ReverseUnroll(), ForwardGradient()) == (False, True, True, False, True)
    assert facts_of(PZOBO(), ForwardGradient()) == (False, False, True, True, True)
    assert facts_of(PZOBO(), ZerothOrder()) == (False, False, False, True, True)
    assert facts_of(FirstOrder(), FSLA()) == (False, False, True, False, False)


def test_what_a_phase_refuses_is_refused() -> None:
    module, (episode,) = Mlp("SGD", shared=True), episodes(1)
    schedule = HypergradientSchedule([(TruncatedReverse(1), 5), (ImplicitGradient(Dense()), None)])
    with pytest.raises(MisconfigurationError, match="^Cannot use `ImplicitGradient` with parameters shared"):
        hypergradient(module, schedule, episode)
    ridge = RidgeSolver()
    with pytest.raises(MisconfigurationError, match="^Cannot use `TruncatedReverse` with `solve_inner`"):
        hypergradient(ridge, schedule, ridge.episode())
    nested = HypergradientSchedule([(FirstOrder(), 1), (schedule, None)])
    with pytest.raises(MisconfigurationError, match="^Cannot use `TruncatedReverse` with `solve_inner`"):
        hypergradient(ridge, nested, ridge.episode())


def test_a_schedule_as_such_refuses_nothing() -> None:
    module = RidgeBlackBox()
    schedule = HypergradientSchedule([(ImplicitGradient(Dense()), 5), (PZOBO(), None)])
    grads = hypergradient(module, schedule, module.episode()).grads
    assert_close(grads, module.optimum(module.episode()).grads, 1e-10)
    schedule = HypergradientSchedule([(PZOBO(), 5), (ReverseUnroll(), None)])
    with pytest.raises(MisconfigurationError, match="^Cannot use `ReverseUnroll` with `solve_inner`") as caught:
        hypergradient(module, schedule, module.episode())
    assert len(str(caught.value).splitlines()) == 1


def test_the_state_of_every_phase_is_kept() -> None:
    def schedule() -> HypergradientSchedule:
        return HypergradientSchedule([(ReverseUnroll(), 2), (ForwardGradient(2, guide=FSLA()), 2), (FSLA(), None)])

    one, other = schedule(), schedule()
    state = one.state_dict()
    assert state == {"phases": [{}, {"guide": {"tracked": None}}, {"tracked": None}]}
    state["phases"][2]["tracked"] = {"k": 3, "v": {}, "d": {}, "phi": {}, "theta": {}}
    other.load_state_dict(state)
    assert other.state_dict() == state


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], r"^Expected `HypergradientSchedule\(phases=\.\.\.\)` to be a list of \(strategy, steps\) that ends with"),
        (
            [(FirstOrder(), 3)],
            r"^Expected `HypergradientSchedule\(phases=\.\.\.\)` to be a list of \(strategy, steps\)",
        ),
        (
            [(FirstOrder(), 0), (FirstOrder(), None)],
            "^Expected `HypergradientSchedule steps of FirstOrder` to be a pos",
        ),
        ([(FirstOrder(), None), (FirstOrder(), None)], "^Expected `HypergradientSchedule steps of FirstOrder` to be a"),
        ([(FirstOrder(), 1.5), (FirstOrder(), None)], "^Expected `HypergradientSchedule steps of FirstOrder` to be a"),
    ],
)
def test_bad_phases(phases: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HypergradientSchedule(phases)


# --- The monitor ---


def by_hand(estimate: Params, reference: Params) -> dict[str, float]:
    a, b = tree.flatten(estimate), tree.flatten(reference)
    return {
        "hypergradient_cosine": torch.nn.functional.cosine_similarity(a, b, dim=0).item(),
        "hypergradient_relative_error": ((a - b).norm() / b.norm()).item(),
        "hypergradient_norm_ratio": (a.norm() / b.norm()).item(),
    }


@pytest.mark.parametrize("strategy", [TruncatedReverse(1), ForwardGradient(4)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("reference", [None, FirstOrder()], ids=["default", "FirstOrder"])
def test_logs_the_comparison_with_the_reference(reference: Any, strategy: HypergradientStrategy) -> None:
    def expected(module: Any, episode: Episode) -> dict[str, float]:
        # The same seed gives the directions of the running estimate.
        own, other = (
            hypergradient(module, one, episode, seed=torch.initial_seed()).grads
            for one in (strategy, reference or ReverseUnroll())
        )
        return by_hand(own, other)

    before = Before(expected)
    fit(strategy, HypergradientMonitor(reference, every_n_steps=1, samples=2), before)
    for metrics, values in zip(before.metrics, before.values, strict=True):
        assert {name: metrics[name].item() for name in values} == pytest.approx(values, rel=1e-9)
    assert len(before.metrics) == len(EPISODES)
    assert ("hypergradient_standard_error" in before.metrics[0]) == strategy.direction_parallel


def test_compares_every_so_many_steps() -> None:
    class Counted(HypergradientMonitor):
        def compare(self, *args: Any) -> dict[str, Tensor]:
            self.calls.append(len(before.metrics))
            return super().compare(*args)

    before, monitor = Before(), Counted(every_n_steps=4)
    monitor.calls = []
    fit(TruncatedReverse(1), monitor, before, max_epochs=2)
    assert monitor.calls == [0, 4, 8]


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: TruncatedReverse(1),
        lambda: ForwardGradient(3, guide=TruncatedReverse(1)),
        lambda: PZOBO(2, mu=0.1),
        lambda: HypergradientSchedule([(ZerothOrder(2, mu=0.1), 2), (ForwardGradient(2), None)]),
    ],
    ids=["TruncatedReverse", "guided", "PZOBO", "schedule"],
)
def test_training_is_the_same_bit_for_bit(strategy: Callable[[], HypergradientStrategy]) -> None:
    class Generator(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.state = torch.get_rng_state()

    def run(*monitors: HypergradientMonitor) -> tuple[Params, Tensor, list[float]]:
        generator, before = Generator(), Before()
        running = fit(strategy(), *monitors, generator, before, module=Fit(dropout=0.3, learned=False))
        return parameters(running.lightning_module), generator.state, before.logged("outer_loss")

    plain = run()
    for reference in (ReverseUnroll(), ImplicitGradient(Identity())):  # the second one draws more masks than a run
        monitored = run(HypergradientMonitor(reference, every_n_steps=1, samples=2))
        assert differing(plain[0], monitored[0]) == []
        assert torch.equal(plain[1], monitored[1])
        assert plain[2] == monitored[2]


def test_the_reference_sees_the_masks_of_the_running_estimate() -> None:
    before = Before()
    fit(ReverseUnroll(), HypergradientMonitor(every_n_steps=1), before, module=Fit(dropout=0.3))
    assert before.logged("hypergradient_relative_error") == pytest.approx([0.0] * len(EPISODES), abs=1e-12)


class Small(Quadratic):
    def __init__(self) -> None:
        super().__init__(inner_steps=1)

    def configure_optimizers(self):
        return torch.optim.SGD([self.phi], lr=0.1)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [(ForwardGradient(1), 2.0), (ForwardGradient(4), 0.5), (ForwardGradient(4, Gaussian()), 1.0)],
    ids=["1", "4", "Gaussian"],
)
def test_standard_error_is_that_of_the_directions(strategy: ForwardGradient, expected: float) -> None:
    module, before = Small(), Before()
    with seeded(1):
        trainer(strategy, HypergradientMonitor(samples=200), before).fit(module, listed([module.episode()]))
    assert before.logged("hypergradient_standard_error")[0] == pytest.approx(expected**0.5, rel=0.1)  # √((N ∓ 1)/b)


def test_standard_error_by_hand() -> None:
    draws = [torch.tensor(values) for values in ([1.0, 2.0], [3.0, 2.0], [2.0, 5.0])]
    asked = []

    def again(strategy: HypergradientStrategy, number: int) -> Hypergradient:
        asked.append((type(strategy).__name__, number))
        value = torch.tensor([3.0, 4.0]) if number == 0 else draws[number - 1]
        return Hypergradient(torch.tensor(0.0), {"a": value[:1], "b": value[1:]}, InnerState({}), {})

    estimate = again(ReverseUnroll(), 1)
    asked.clear()
    metrics = HypergradientMonitor(samples=3).compare(ForwardGradient(), estimate, again)
    # The mean is (2, 3), the squared deviations 1 + 1, 1 + 1 and 0 + 4.
    assert metrics["hypergradient_standard_error"].item() == pytest.approx((8 / 2) ** 0.5 / 5)
    assert metrics["hypergradient_cosine"].item() == pytest.approx(11 / 5 / 5**0.5)
    assert metrics["hypergradient_norm_ratio"].item() == pytest.approx(5**0.5 / 5)
    assert metrics["hypergradient_relative_error"].item() == pytest.approx(8**0.5 / 5)
    assert asked == [("ReverseUnroll", 0), *(("ForwardGradient", number) for number in (1, 2, 3))]
    for monitor, strategy in ((HypergradientMonitor(samples=0), PZOBO()), (HypergradientMonitor(), FirstOrder())):
        assert "hypergradient_standard_error" not in monitor.compare(strategy, estimate, again)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, r"every_n_steps=\.\.\.\)` to be a positive integer, got 0"),
        ({"every_n_steps": 2.0}, r"every_n_steps=\.\.\.\)` to be a positive integer, got 2.0"),
        ({"samples": 1}, r"samples=\.\.\.\)` to be 0, or an integer of at least 2, got 1"),
        ({"samples": -2}, r"samples=\.\.\.\)` to be 0, or an integer of at least 2, got -2"),
        ({"samples": True}, r"samples=\.\.\.\)` to be 0, or an integer of at least 2, got True"),
        ({"samples": 4.0}, r"samples=\.\.\.\)` to be 0, or an integer of at least 2, got 4.0"),
    ],
)
def test_bad_arguments_of_the_monitor(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^Expected `HypergradientMonitor\({message}"):
        HypergradientMonitor(**arguments)


def test_a_module_without_levels_has_nothing_to_monitor() -> None:
    class Plain(LightningModule):
        def training_step(self, batch: Any) -> None: ...

        def configure_optimizers(self) -> None: ...

    with pytest.raises(MisconfigurationError, match=r"^`Plain` has no hypergradient to monitor\."):
        trainer(HypergradientMonitor()).fit(Plain(), listed(EPISODES))


def test_a_monitor_alone_is_no_strategy() -> None:
    with pytest.raises(MisconfigurationError, match=r"^`Fit` has no hypergradient strategy\."):
        trainer(HypergradientMonitor()).fit(Fit(), listed(EPISODES))


def test_a_reference_that_cannot_work_is_refused_before_the_first_batch() -> None:
    class BlackBox(RidgeBlackBox):
        def configure_optimizers(self):
            return torch.optim.SGD([self.log_penalty], lr=0.1)

    module, before = BlackBox(), Before()
    message = (
        r"^Cannot use `ReverseUnroll` with `solve_inner`.*\nIt is the reference of `HypergradientMonitor`: pass another"
    )
    with pytest.raises(MisconfigurationError, match=message):
        trainer(PZOBO(), HypergradientMonitor(), before).fit(module, listed([module.episode()]))
    assert before.values == []
    monitor = HypergradientMonitor(ImplicitGradient(Dense()))
    trainer(PZOBO(), monitor, before).fit(module, listed([module.episode()]))
    assert before.metrics[0]["hypergradient_cosine"].isfinite()


# --- The table of facts ---


def test_every_strategy_is_in_the_table_once_with_all_facts() -> None:
    public = set(strategies.__all__) - {"HypergradientStrategy"}
    rows = facts()
    assert sorted(public) == [row.name for row in rows]
    for row in rows:
        kind = getattr(strategies, row.name)
        assert row[1:] == tuple(getattr(kind, field) for field in Facts._fields[1:])
        assert [type(value) for value in row] == [str, bool, bool, str, bool, bool, str, str]
        assert "" not in row


def test_the_table_in_markdown() -> None:
    lines = markdown().splitlines()
    assert len(lines) == len(facts()) + 2
    assert {line.count("|") for line in lines} == {len(Facts._fields) + 1}
    (line,) = (line for line in lines if line.startswith("| `PZOBO` |"))
    assert line == "| `PZOBO` | no | no | solve | no | yes | O(M · chunk) | Q + 1 inner runs |"


def test_a_monitor_lets_go_of_the_module_where_no_strategy_came() -> None:
    module = Fit()
    with pytest.raises(MisconfigurationError, match=r"`Fit` has no hypergradient strategy\."):
        trainer(HypergradientMonitor()).fit(module, listed(EPISODES))
    assert module._monitors == []
