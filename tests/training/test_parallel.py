"""Fits in two processes: what they agree on, and what one process would have done."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import seed_everything
from pytorch_lightning.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
)
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

from lightning_bilevel import (
    DirectionParallelStrategy,
    ForwardGradient,
    HypergradientSchedule,
    HypergradientStrategy,
    ReverseUnroll,
    tree,
)
from lightning_bilevel.errors import MisconfigurationError, NonfiniteError, nonfinite_error, value_error
from lightning_bilevel.problem import Hypergradient, InnerState
from lightning_bilevel.training.estimating import estimated
from lightning_bilevel.training.parallel import Ranks
from tests.support.modules import identical, trainer
from tests.support.processes import ran
from tests.support.seeds import call_of, forgotten
from tests.support.tables import ROWS
from tests.support.workers.parallel import DIRECTIONS, EVERY, HABITS, OTHER, RESUMED, SEED, STEPS, TROUBLE, Noisy, fit


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Run all cases in one pair of processes; return what each rank saw."""
    folder = tmp_path_factory.mktemp("ranks")
    ran("parallel.py", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture
def unseeded() -> Iterator[None]:
    """Let a test seed everything, and forget it afterwards."""
    with forgotten():
        yield


def furthest(a: Any, b: Any) -> float:
    """Return the largest difference between two containers of equal structure."""
    leaves_a, structure_a = tree_flatten(a)
    leaves_b, structure_b = tree_flatten(b)
    assert structure_a == structure_b
    pairs = [(x, y) for x, y in zip(leaves_a, leaves_b, strict=True) if isinstance(x, (Tensor, float, int))]
    return max(float((torch.as_tensor(x).double() - torch.as_tensor(y).double()).abs().max()) for x, y in pairs)


def ended(found: dict[str, Any]) -> list[Any]:
    """Return everything that the ranks have to agree on at the end."""
    return [found["module"], found["carried"]]


# ---------------------------------------------------------------------------------------------------------------------
# Data parallel: strategy="ddp"
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*EVERY, *OTHER])
def test_ranks_end_with_equal_parameters_and_state(ranks, name):
    first, second = (rank[name] for rank in ranks)
    assert first["error"] is None
    assert second["error"] is None
    assert len(first["logged"]) == STEPS
    assert not identical(first["start"], first["module"])
    assert identical(ended(first), ended(second))


@pytest.mark.filterwarnings("ignore:.*diverges")  # what the solver says of an untrained net
@pytest.mark.parametrize("name", EVERY)
def test_the_averaged_hypergradient_is_the_mean_of_one_process_estimates(ranks, name):
    case = EVERY[name]
    estimates = []
    for rank, found in enumerate(ranks):
        module = Noisy(**case.options)
        module.load_state_dict(found[name]["start"])
        memory, episodes = module.fit_context.memory, [found[name]["batch"]]
        call = call_of(SEED, rank=rank)
        estimates.append(estimated(module.functional(), memory, case.strategy(), episodes, call))
    assert not identical(ranks[0][name]["batch"], ranks[1][name]["batch"])
    mean = tree.scale(tree.add(estimates[0].grads, estimates[1].grads), 0.5)
    assert furthest(ranks[0][name]["grads"], mean) <= 1e-9 * float(tree.norm(mean))
    h = (estimates[0].value + estimates[1].value) / 2
    assert [rank[name]["logged"][0]["outer_loss"] for rank in ranks] == pytest.approx([float(h)] * 2, rel=1e-6)


def test_layers_built_differently_start_as_on_rank_0(ranks):
    first, second = (rank["other layers on each rank"] for rank in ranks)
    assert identical(first["start"], second["start"])
    initial = first["carried"]["initial"]
    assert furthest(initial, {name: first["start"][name] for name in initial}) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Direction parallel: strategy="ddp_directions"
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIRECTIONS)
def test_two_processes_train_as_one(ranks, name):
    one = fit(DIRECTIONS[name])
    assert one["error"] is None
    for rank in ranks:
        two = rank[name]
        assert two["error"] is None
        assert identical(two["batch"], one["batch"])
        assert furthest(two["grads"], one["grads"]) <= 1e-9 * float(tree.norm(one["grads"]))
        assert furthest(ended(two), ended(one)) <= 1e-9
        assert furthest(two["logged"], one["logged"]) <= 1e-6  # also the norm, and what a monitor logs
    assert identical(ended(ranks[0][name]), ended(ranks[1][name]))


def test_workers_are_seeded_as_on_rank_0(unseeded):
    seed_everything(3, workers=True, verbose=False)
    parallel = DirectionParallelStrategy()
    loader = parallel.process_dataloader(DataLoader(list(range(4)), num_workers=0))
    assert loader.worker_init_fn.keywords == {"rank": 0}
    own = DataLoader(list(range(4)), worker_init_fn=print)
    assert parallel.process_dataloader(own).worker_init_fn is print
    assert parallel.distributed_sampler_kwargs == {"num_replicas": 1, "rank": 0}


# ---------------------------------------------------------------------------------------------------------------------
# Habits: resume, accumulation, several episodes in a batch, loader workers, steps that are skipped
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_resume_exactly(ranks, name):
    for rank in ranks:
        whole, resumed = rank[name], rank[f"{name}, resumed"]
        assert whole["error"] is None
        assert resumed["error"] is None
        assert identical(ended(resumed), ended(whole))
        assert resumed["logged"] == whole["logged"][-1:]
    assert identical(ended(ranks[0][f"{name}, resumed"]), ended(ranks[1][f"{name}, resumed"]))


@pytest.mark.parametrize("name", HABITS)
def test_habits_in_two_processes(ranks, name):
    """Where directions are shared out, as in one process; where episodes are, at least equal on both."""
    case = HABITS[name]
    for rank in ranks:
        assert rank[name]["error"] is None
    assert identical(ended(ranks[0][name]), ended(ranks[1][name]))
    assert not identical(ranks[0][name]["start"], ranks[0][name]["module"])
    if "skip" in name:  # the trouble is on rank 1 only
        assert [rank[name]["logged"][-1]["skipped_steps"] for rank in ranks] == [1, 1]
    elif case.parallel == "ddp_directions":
        one = fit(case)
        assert furthest(ended(ranks[0][name]), ended(one)) <= 1e-9
        assert furthest(ranks[0][name]["logged"], one["logged"]) <= 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("inner", "NonfiniteError", "Expected the inner loss at step . of 2 to be finite, got nan"),
        ("outer", "NonfiniteError", "Expected the outer loss to be finite, got nan"),
        ("outer, shared", "NonfiniteError", "Expected the outer loss to be finite, got nan"),
        ("episodes", "ArgumentError", "to be at least one episode, got"),
        ("unequal outer", "MisconfigurationError", "have to see the same episodes"),
        ("unequal inner", "MisconfigurationError", "seed_everything.seed, workers=True."),
    ],
)
def test_an_error_on_one_rank_is_raised_on_both(ranks, name, kind, message):
    assert name in TROUBLE
    for rank in ranks:
        error, text = rank[name]["error"]
        assert error == kind
        with pytest.raises(RuntimeError, match=message):
            raise RuntimeError(text)
    if not name.startswith("unequal"):
        assert ranks[0][name]["error"][1] == f"{ranks[1][name]['error'][1]} (This was on rank 1: {kind}.)"


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_shard_parameters_are_refused(strategy):
    fake = SimpleNamespace(strategy=object.__new__(strategy), accumulate_grad_batches=1)
    with pytest.raises(
        MisconfigurationError, match=f"`{strategy.__name__}`. This is because .* `Trainer.strategy='ddp'"
    ):
        Noisy().fit_context.begin(ReverseUnroll(), fake)


EVERYTHING = {name: row.strategy for name, row in ROWS.items()} | {
    "mixed schedule": HypergradientSchedule([(ForwardGradient(), 1), (ReverseUnroll(), None)])
}


WITHOUT = {name: strategy for name, strategy in EVERYTHING.items() if not strategy.direction_parallel}


@pytest.mark.parametrize("strategy", WITHOUT.values(), ids=WITHOUT)
def test_strategies_without_directions_cannot_share_them(strategy: HypergradientStrategy):
    two = trainer(strategy="ddp_directions", devices=2)
    assert isinstance(two.strategy, DirectionParallelStrategy)
    name = type(strategy).__name__
    with pytest.raises(
        MisconfigurationError, match=f"`{name}` with `Trainer.*has no directions .*Trainer.strategy='ddp'"
    ):
        Noisy().fit_context.begin(strategy, two)


def test_the_strategy_is_registered():
    assert StrategyRegistry["ddp_directions"]["strategy"] is DirectionParallelStrategy
    assert issubclass(DirectionParallelStrategy, DDPStrategy)


# ---------------------------------------------------------------------------------------------------------------------
# One process
# ---------------------------------------------------------------------------------------------------------------------


def test_one_process_communicates_nothing(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    for name in ("all_gather", "all_reduce", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, refuse)
    found = fit(DIRECTIONS["PZOBO 5"])
    assert found["error"] is None


def test_tensors_travel_together(monkeypatch):
    """One collective per dtype, half precision with single; the tensors change in place."""
    sent = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: sent.append(flat.clone()) or flat.mul_(3))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda flat, src: sent.append(flat.clone()) or flat.fill_(9))
    two = Ranks(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), global_rank=1, world_size=2))
    tensors = [
        torch.ones(2, 2),
        torch.ones(3, dtype=torch.float64),
        torch.tensor(4),
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor(2.0, requires_grad=True),
    ]
    two.average_(tensors)
    assert [(flat.dtype, flat.numel()) for flat in sent] == [(torch.float32, 7), (torch.float64, 3), (torch.int64, 1)]
    assert [float(tensor.detach().flatten()[0]) for tensor in tensors] == [1.5, 1.5, 9, 1.5, 3]
    assert two.rank == 1
    assert two.shard == (0, 1)


class Overflow(FloatingPointError):
    """A user's own kind of what may be skipped."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (nonfinite_error("loss", "nan", "Lower it."), NonfiniteError),
        (Overflow("too large"), FloatingPointError),
        (value_error("a", "b", 1), ValueError),
        (KeyError("x"), Exception),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_error_of_another_process_is_of_the_same_kind(monkeypatch, error, kind):
    """So that a step is skipped on all of them, or on none: one alone would wait for the others for ever."""
    sent: list[Any] = []
    fake = SimpleNamespace(root_device=torch.device("cpu"), broadcast=lambda message, src: sent.append(message))
    monkeypatch.setattr(torch.distributed, "all_gather", lambda all, own: all[1].fill_(1))
    two = Ranks(SimpleNamespace(strategy=fake, global_rank=0, world_size=2))

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as own:
        two.raise_on_all(fail)
    assert own.value is error
    fake.broadcast = lambda message, src: sent[0]
    with pytest.raises(kind, match=r"\(This was on rank 1: \w+\.\)") as other:
        two.raise_on_all(lambda: None)
    assert isinstance(other.value, FloatingPointError) == isinstance(error, FloatingPointError)


@pytest.mark.parametrize(("last_digits", "sent"), [(0, 0), (1e-12, 1), (1e-3, None)])
def test_state_that_differs_by_rounding_is_that_of_rank_0(monkeypatch, last_digits, sent):
    """Where ranks share directions: equal states stay unsent; unequal data is an error."""
    calls = []
    other = torch.tensor([0.0, 1 + last_digits], dtype=torch.float64)
    monkeypatch.setattr(torch.distributed, "all_gather", lambda all, own: (all[0].copy_(own), all[1].copy_(other)))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(2))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda flat, src: calls.append(src) or flat.fill_(9))
    two = Ranks(trainer(strategy="ddp_directions", devices=2))
    estimate = Hypergradient(torch.ones((), dtype=torch.float64), {"w": torch.ones(2)}, InnerState({}), {})
    if sent is None:
        with pytest.raises(MisconfigurationError, match="that is 1 on rank 0, 1.001 on rank 1"):
            two.reduce_estimate(lambda: estimate)
        return
    made, h = two.reduce_estimate(lambda: estimate)
    theta = torch.zeros(2)
    two.average_([theta])
    assert len(calls) == sent
    assert theta.tolist() == [9.0 * sent] * 2
    assert made.grads["w"].tolist() == [1, 1]
    assert float(h) == pytest.approx(1)
    assert two.shard == (0, 2)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("ddp_directions", marks=pytest.mark.slow)])
def test_parameters_in_neither_level(strategy: str) -> None:
    """DDP would wait for their gradients."""
    assert "trained" in ran("backbone.py", strategy)
