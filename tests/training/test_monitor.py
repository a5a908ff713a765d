"""The monitor compares with a reference what a fit estimates, and leaves no trace in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor

from lightning_bilevel import (
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
    tree,
)
from lightning_bilevel.directions import Blocks, DirectionSampler, Gaussian, Orthogonal, Rademacher
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Dense, Identity
from lightning_bilevel.problem import Carry, InnerState
from lightning_bilevel.testing import Several
from lightning_bilevel.tree import Params
from tests.support.fits import EPISODES, Before, Fit, fit
from tests.support.modules import NoLevels, differing, listed, parameters, trainer
from tests.support.problems import Quadratic, RidgeBlackBox
from tests.support.seeds import forked


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
        lambda: ForwardGradient(3, guide=TruncatedReverse(1), remember=True),
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
    with forked(1):
        trainer(strategy, HypergradientMonitor(samples=200), before).fit(module, listed([module.episode()]))
    assert before.logged("hypergradient_standard_error")[0] == pytest.approx(expected**0.5, rel=0.1)  # √((N ∓ 1)/b)


@pytest.mark.parametrize("sampler", [Gaussian(), Blocks()], ids=lambda each: type(each).__name__)
def test_estimates_say_what_they_know_without_a_reference(sampler: DirectionSampler) -> None:
    """Shares of ‖∇h‖² and the cosine that a reference finds, from the estimate alone."""
    module = Several(inner_steps=2)
    episode = module.episode()
    exact = hypergradient(module, ReverseUnroll(), episode).grads
    memory = tree.add(exact, tree.unflatten(torch.linspace(-1, 1, tree.numel(exact)).double(), exact), alpha=0.3)
    carry = Carry(InnerState({}), {"memory": memory})
    strategy = ForwardGradient(4, sampler, guide=TruncatedReverse(1), remember=True)
    found, cosines = [], []
    for seed in range(150):
        result = hypergradient(module, strategy, episode, seed=seed, carry=carry)
        found.append({name: value.item() for name, value in strategy.explained(result, 0.5).items()})
        cosines.append(by_hand(result.grads, exact)["hypergradient_cosine"])
    means = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
    assert set(means) == {"explained_by_guide", "explained_by_memory", "expected_cosine", "directions_needed"}
    for name, q in result.known.items():
        square = tree.dot(q, exact) ** 2 / tree.norm(exact) ** 2
        assert means[f"explained_by_{name}"] == pytest.approx(square.item(), rel=0.15)
    assert means["expected_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=0.05)


def test_directions_needed_give_the_cosine_that_is_wanted() -> None:
    """cos² = 1/(x + (1 − x)(1 + error of b − k directions)), x the part that is known."""
    g = torch.linspace(1, 2, 100, dtype=torch.float64)
    q = g + 5 * torch.linspace(-1, 1, 100, dtype=torch.float64).sin()
    known = {"memory": {"w": q / q.norm()}}
    estimate = Hypergradient(torch.tensor(0.0), {"w": g}, InnerState({}), {}, known=known)
    for sampler in (Rademacher(), Gaussian(), Blocks(), Orthogonal()):
        for cosine in (0.3, 0.9):
            said = ForwardGradient(8, sampler, remember=True).explained(estimate, cosine)
            x, m = said["explained_by_memory"].item(), int(said["directions_needed"]) - 1
            squares = [1 / (x + (1 - x) * (1 + sampler.of(max(c, 1)).error(99, max(c, 1)))) for c in (m, m - 1)]
            assert squares[0] >= cosine**2
            assert m == 1 or squares[1] < cosine**2


def test_without_a_reference_nothing_more_is_estimated() -> None:
    asked = []
    monitor = HypergradientMonitor(reference=False)
    result = hypergradient(Several(), ForwardGradient(4), Several().episode())
    assert set(monitor.compare(ForwardGradient(4), result, lambda *args: asked.append(args))) == {
        "hypergradient_expected_cosine",
        "hypergradient_directions_needed",
    }
    assert asked == []
    assert monitor.compare(FirstOrder(), result, lambda *args: asked.append(args)) == {}
    before = Before()
    schedule = HypergradientSchedule([(ForwardGradient(3, remember=True), 2), (FirstOrder(), None)])
    fit(schedule, HypergradientMonitor(reference=False, every_n_steps=1), before)
    logged = ["hypergradient_explained_by_memory" in each for each in before.metrics]
    assert logged[:2] == [False, True]  # nothing is known at first
    assert "hypergradient_cosine" not in before.metrics[-1]


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
        ({"cosine": 0}, r"cosine=\.\.\.\)` to be a positive number, got 0"),
        ({"cosine": 1}, r"cosine=\.\.\.\)` to be a number in \(0, 1\), got 1"),
        ({"samples": 4.0}, r"samples=\.\.\.\)` to be 0, or an integer of at least 2, got 4.0"),
    ],
)
def test_bad_arguments_of_the_monitor(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^Expected `HypergradientMonitor\({message}"):
        HypergradientMonitor(**arguments)


def test_a_module_without_levels_has_nothing_to_monitor() -> None:
    with pytest.raises(MisconfigurationError, match=r"^`NoLevels` has no hypergradient to monitor\."):
        trainer(HypergradientMonitor()).fit(NoLevels(), listed(EPISODES))


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


def test_a_monitor_lets_go_of_the_module_where_no_strategy_came() -> None:
    module = Fit()
    with pytest.raises(MisconfigurationError, match=r"`Fit` has no hypergradient strategy\."):
        trainer(HypergradientMonitor()).fit(module, listed(EPISODES))
    before = Before()
    fit(TruncatedReverse(1), before, module=module)
    assert set(before.metrics[0]) == {"outer_loss", "inner_loss", "hypergradient_norm"}
