"""The benchmarks of data cleaning: their clock, when a run counts as good, and that other libraries do the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS / "papers")
    import data_cleaning_curves

    return data_cleaning_curves


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("higher")
    pytest.importorskip("torchopt")
    monkeypatch.syspath_prepend(BENCHMARKS / "peers")
    import equal_quality

    return equal_quality


def images() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 28, 28, generator=generator), torch.arange(40) % 10
    train = TensorDataset(x[:30], y[:30], torch.arange(30))
    return SimpleNamespace(train=train, validation=TensorDataset(x[30:], y[30:]), is_wrong=torch.arange(30) % 5 > 0)


def fake_time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("time.process_time", lambda: now[0])
    return now


@pytest.mark.parametrize("name", ["FSLA", "CG-1-10", "BP-20"])
def test_a_curve(name: str, curves: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "BATCH_SIZE", 8)
    found = curves.curve(curves.METHODS[name], images(), seed=0, budget=0.4)
    assert len(found["steps"]) == len(found["seconds"]) == len(found["losses"]) > 0
    assert list(found["steps"]) == sorted(set(found["steps"]))
    assert found["seconds"][-1] >= 0.4
    assert 0 < found["losses"][-1] < 10


def test_a_double_loop_starts_anew_and_a_single_loop_goes_on(curves: Any) -> None:
    for name, method in curves.METHODS.items():
        assert (method.inner_start == "warm") == (method.inner_steps == 1), name
        module = curves.CleaningCNN(30, method.inner_steps, method.inner_start)
        assert method.strategy().refusals(module.functional().problem) == []


def test_looks_do_not_count(curves: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = fake_time(monkeypatch)
    clock = curves.Clock()
    now[0] = 2.0
    with clock.paused():
        now[0] = 7.0
    now[0] = 8.0
    assert clock.seconds == 3.0


def test_a_look_when_a_mark_is_passed(curves: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = fake_time(monkeypatch)
    seen = []

    def look(step: int, seconds: float, logits: Any) -> bool:
        seen.append((step, seconds))
        return False

    watch = curves.Watch(curves.Clock(), [1.0, 2.0, 3.0, 10.0], look)
    stops = []
    for step, seconds in enumerate((0.5, 1.5, 1.8, 3.5, 4.0, 11.0)):
        now[0] = seconds
        stops.append(watch.passed(step, torch.zeros(1)))
    assert seen == [(1, 1.5), (3, 3.5), (5, 11.0)]
    assert stops == [False] * 5 + [True]


def test_marks_reach_the_end(curves: Any) -> None:
    marks = curves.marks(20.0)
    assert marks[0] == 0.5
    assert marks[-1] == pytest.approx(20.0)
    assert marks[2] / marks[1] == pytest.approx(marks[-1] / marks[-2])


def test_batches_go_through_all_examples(curves: Any) -> None:
    data = images()
    episodes = iter(curves.Episodes(data, inner_batches=3, batch_size=10, seed=0))
    first, again = next(episodes), next(iter(curves.Episodes(data, inner_batches=3, batch_size=10, seed=0)))
    assert sorted(torch.cat([index for _, _, index in first.inner]).tolist()) == list(range(30))
    assert torch.equal(first.inner[0][2], again.inner[0][2])
    assert not torch.equal(first.inner[0][2], next(episodes).inner[0][2])


def judged(quality: Any, values: list[float]) -> dict[str, Any]:
    data = SimpleNamespace(is_wrong=torch.tensor([True, False]))
    given = iter(values)
    problem = quality.Problem(None, data, 1, {}, {}, 0.9, lambda net, logits: next(given), budget=1.0)
    judge = quality.Judge(problem, None)
    stops = [judge(step, step / 10, torch.tensor([0.0, 1.0])) for step in range(len(values))]
    assert stops[:-1] == [False] * (len(values) - 1)
    return judge.found()


def test_once_is_not_enough(quality: Any) -> None:
    assert judged(quality, [0.5, 0.95, 0.8, 0.91, 0.92]) == {"seconds": 0.3, "steps": 3, "best": 0.95}
    assert judged(quality, [0.5, 0.95, 0.8, 0.91])["seconds"] is None


PEERS = ["by hand, reverse", "higher, reverse", "TorchOpt, reverse", "TorchOpt, Neumann", "TorchOpt, CG"]
BOAT_AND_BETTY = ["BOAT, reverse", "BOAT, Neumann", "Betty, Neumann"]


@pytest.mark.filterwarnings("ignore")  # the other libraries' own, and that the net's Hessian is not positive
@pytest.mark.parametrize("name", PEERS + BOAT_AND_BETTY)
def test_another_library_computes_our_hypergradient(name: str, quality: Any) -> None:
    if not quality.PEERS[name].installed:
        pytest.skip(f"{name} is not installed: benchmarks/results/peers.md says how")
    assert quality.difference(quality.digits(0), name) < 1e-4


@pytest.mark.filterwarnings("ignore:`Neumann")
def test_a_wrong_hypergradient_would_be_seen(quality: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = quality.PEERS["by hand, reverse"]._replace(same_as="Neumann")
    monkeypatch.setitem(quality.PEERS, "by hand, reverse", other)
    assert quality.difference(quality.digits(0), "by hand, reverse") > 1e-2


@pytest.mark.parametrize("name", ["by hand, reverse", "higher, reverse", "TorchOpt, reverse", "BOAT, reverse"])
@pytest.mark.filterwarnings("ignore")
def test_another_library_takes_our_steps(name: str, quality: Any) -> None:
    """Minibatches, the carried net and Adam included: after some outer steps the weights are those of the Trainer."""
    if not quality.PEERS[name].installed:
        pytest.skip(f"{name} is not installed: benchmarks/results/peers.md says how")
    problem = quality.digits(0)._replace(batch_size=50)
    episodes = quality.Episodes(problem.data, quality.INNER_STEPS, 50, seed=1)
    taken = 4
    module = problem.module(**problem.options)
    stop = SimpleNamespace(passed=0)

    def look(step: int, seconds: float, logits: torch.Tensor) -> bool:
        stop.passed = step
        return step >= taken

    watch = quality.Watch(quality.Clock(), [1e-9 * 2**k for k in range(99)], look)
    quality.fit(module, problem.strategies["reverse"].strategy(), episodes, watch)
    loop = quality.PEERS[name].make(quality.task(problem, partial(torch.optim.Adam, lr=problem.options["outer_lr"])))
    for _, episode in zip(range(stop.passed), episodes, strict=False):
        loop.step(episode)
    assert stop.passed > 0
    assert loop.logits.detach().abs().max() > 0.05
    torch.testing.assert_close(loop.logits.detach(), module.logits.detach(), rtol=1e-3, atol=1e-4)
    ours = torch.cat([value.detach().flatten() for value in module.net.parameters()])
    theirs = torch.cat([value.detach().flatten() for value in loop.net.parameters()])
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_looks_by_steps_are_a_tenth_apart_and_end_with_the_seconds(quality: Any) -> None:
    steps: list[int] = []
    watch = quality.StepWatch(10.0, lambda step, seconds, logits: steps.append(step))
    watch.clock = SimpleNamespace(seconds=0.0)
    assert not any(watch.passed(step, torch.zeros(1)) for step in range(1, 61))
    assert steps[:3] == [quality.FIRST_LOOK, 6, 7]
    assert steps[-3:] == [46, 51, 56]
    watch.clock.seconds = 10.0
    assert watch.passed(57, torch.zeros(1))
    assert steps[-1] == 57


@pytest.mark.filterwarnings("ignore")
def test_a_library_that_fails_is_reported(quality: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(task: Any) -> Any:
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setitem(quality.PEERS, "broken", quality.PEERS["by hand, reverse"]._replace(make=broken))
    assert quality.run_one(quality.digits(0), "broken", 0) == {"fails": "RuntimeError: no such thing"}
    missing = quality.PEERS["by hand, reverse"]._replace(library="no library")
    monkeypatch.setitem(quality.PEERS, "missing", missing)
    assert quality.run_one(quality.digits(0), "missing", 0) == {"fails": "no library is not installed"}


@pytest.mark.filterwarnings("ignore")
def test_phases_end_together(quality: Any) -> None:
    problem = quality.digits(0)._replace(quality=lambda net, logits: 0.5)
    found = quality.phases(problem, seed=0, budget=0.6)
    assert list(found) == ["phase I", "phase II", "both"]
    assert all(row["steps"] > 0 for row in found.values())
    assert found["phase I"]["steps"] > found["phase II"]["steps"]
