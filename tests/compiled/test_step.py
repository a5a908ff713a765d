"""A compiled step has the functions of the step it was made from: every strategy gets the same numbers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bilevel import (
    DARTS,
    SGD,
    Adam,
    ForwardGradient,
    ForwardUnroll,
    GammaGreedy,
    HypergradientStrategy,
    ImplicitGradient,
    PenaltyGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
    hypergradient,
)
from lightning_bilevel.calculus import inner_step, run
from lightning_bilevel.compiled import CompiledStep, Compiler, compiler, plan
from lightning_bilevel.compiled.program import Part
from lightning_bilevel.linear_solvers import Neumann
from lightning_bilevel.problem import BilevelProblem, Episode, InnerState
from tests.support.compiled import CLASSES, FEATURES, Weighted, apart, both, episode, needs_inductor, weighted
from tests.support.modules import Maml

STRATEGIES: dict[str, Callable[[], HypergradientStrategy]] = {
    "reverse": ReverseUnroll,
    "checkpointed": lambda: ReverseUnroll(checkpoint=2),
    "truncated": lambda: TruncatedReverse(2),
    "greedy": lambda: GammaGreedy(0.9),
    "forward gradient": lambda: ForwardGradient(3, chunk_size=2),
    "forward gradient by forward mode": lambda: ForwardGradient(3, mode="forward"),
    "forward": ForwardUnroll,
    "implicit": lambda: ImplicitGradient(Neumann(3, step_size=0.3)),
    "differences": lambda: ZerothOrder(2),
    "DARTS": DARTS,
}
HIDDEN = 8


def stacked(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), *middle, nn.Linear(HIDDEN, CLASSES))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES))


class Attention(nn.Module):
    """A layer of a transformer, and a head on the mean of what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = (
            nn.TransformerEncoderLayer(FEATURES, 2, 8, 0.0, batch_first=True),
            nn.Linear(FEATURES, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Transformer(nn.Module):
    """Layers of a transformer with dropout, which look back only, and at what is no padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(FEATURES, 2, 8, 0.5, batch_first=True)
        self.encoder, self.head = (
            nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
            nn.Linear(FEATURES, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.head(self.encoder(x, causal, x[..., 0] > 9, is_causal=True).mean(1))


class Twice(nn.Module):
    """A batch norm that sees one batch twice, and counts it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.net(x).tanh()


class Recomputed(nn.Module):
    """A net whose activations are computed again on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dropout": (lambda: stacked(nn.Dropout(), nn.Tanh(), nn.Dropout()), (FEATURES,)),
    "BatchNorm": (lambda: stacked(nn.BatchNorm1d(HIDDEN)), (FEATURES,)),
    "BatchNorm, twice": (Twice, (FEATURES,)),
    "LayerNorm": (lambda: stacked(nn.LayerNorm(HIDDEN)), (FEATURES,)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, CLASSES)), (FEATURES,)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, CLASSES)), (FEATURES,)),
    "convolution": (convolution, (1, 4, 4)),
    "attention": (Attention, (2, FEATURES)),
    "a transformer": (Transformer, (2, FEATURES)),
    "recomputed": (Recomputed, (FEATURES,)),
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_strategies(strategy: Callable[[], HypergradientStrategy], calls: list[int]) -> None:
    module = weighted(optimizer=lambda module: SGD(lr=module.log_lr.exp(), momentum=0.5))
    if isinstance(strategy(), ImplicitGradient):
        module.optimizer = lambda module: SGD(lr=0.3)
        module.log_lr.requires_grad_(False)
    assert apart(*both(module, strategy())) < 2e-6
    assert calls


@pytest.mark.parametrize("strategy", ["reverse", "truncated", "forward gradient"])
def test_stretches_of_steps_with_a_rest(strategy: str, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(plan.Plan, "most", lambda self, name, *args: self.graphs.most.setdefault(name, 3))
    module = weighted(optimizer=lambda module: SGD(lr=module.log_lr.exp(), momentum=0.5), inner_steps=7)
    assert apart(*both(module, STRATEGIES[strategy]())) < 2e-6
    assert set(calls) == ({0, 3, 4, 5} if strategy == "truncated" else {0, 3, 6})  # steps before each graph


@pytest.mark.slow
@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("name", NETS)
def test_nets_one_step_after_another(name: str, calls: list[int]) -> None:
    net, features = NETS[name]
    assert apart(*both(weighted(net=net), episodes=episode(features=features))) < 2e-6
    assert len(calls) >= 3


SLOW = {"BatchNorm, twice", "LayerNorm", "weight norm", "attention", "recomputed"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NETS])
def test_nets(name: str, calls: list[int]) -> None:
    net, features = NETS[name]
    module = weighted(net=net)
    assert apart(*both(module, episodes=episode(features=features))) < 2e-6
    assert calls


def test_a_graph_has_operations_for_a_few_directions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    said, rows, call = list[str](), list[int](), Part.__call__
    monkeypatch.setattr(compiler, "rank_zero_info", said.append)
    monkeypatch.setattr(
        Part, "__call__", lambda part, steps, args: (rows.append(len(args[-1])), call(part, steps, args))[1]
    )
    assert apart(*both(weighted(inner_steps=1), ForwardGradient(70))) < 2e-6
    assert {*rows} == {14}, "70 in five equal chunks of at most 16"
    rows.clear()
    assert apart(*both(weighted(inner_steps=1), ForwardGradient(70, chunk_size=70))) < 2e-6
    assert not rows
    assert "70 directions at once are not pushed by graphs" in said[-1]


@pytest.mark.parametrize("strategy", [lambda: ReverseUnroll(checkpoint=1), lambda: ForwardGradient(2), DARTS])
def test_masks_are_those_of_the_eager_step(strategy: Callable[[], HypergradientStrategy], calls: list[int]) -> None:
    module = weighted(net=NETS["dropout"][0])
    assert apart(*both(module, strategy())) < 2e-6
    assert calls


def test_stacked_episodes(calls: list[int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(), nn.Tanh(), nn.Linear(8, CLASSES))
    module = Maml(net, F.cross_entropy, compile=True, episode_chunk_size=3)
    episodes = [Episode([each.inner[0][:2]], each.outer[:2]) for each in map(episode, range(3))]
    assert apart(*both(module, episodes=episodes)) < 2e-6
    assert len(calls) == 1 + 1  # one of them is the comparison with the eager step


@pytest.mark.filterwarnings("ignore:The outer losses are not compiled. it writes to an attribute")
def test_what_an_outer_loss_writes_between_steps_is_seen() -> None:
    class Writing(Weighted):
        scale = 1.0

        def outer_loss(self, batch: Any) -> Tensor:
            self.scale = self.scale + 1
            return super().outer_loss(batch)

        def inner_loss(self, batch: Any) -> Tensor:
            return super().inner_loss(batch) * self.scale

        def outer_loss_weights(self) -> Tensor:
            return torch.tensor([0.2, 0.3, 0.5])

    torch.manual_seed(0)
    assert apart(*both(Writing())) < 2e-6


def test_a_proximal_term(calls: list[int]) -> None:
    torch.manual_seed(0)
    module = Maml(nn.Linear(FEATURES, CLASSES), F.cross_entropy, proximal=0.5, compile=True)
    given = episode()
    assert apart(*both(module, episodes=Episode([given.inner[0][:2]], given.outer[:2]))) < 2e-6
    assert calls
    module.proximal = 2.0
    assert apart(*both(module, episodes=Episode([given.inner[0][:2]], given.outer[:2]))) < 2e-6


def test_float64(calls: list[int]) -> None:
    module, given = weighted(optimizer=lambda module: Adam(lr=0.1)).double(), episode()
    batch, _ = given.inner
    doubled = (batch[0].double(), *batch[1:])
    assert apart(*both(module, episodes=Episode([doubled], doubled))) < 1e-12
    assert calls


class Own(PenaltyGradient):
    """Steps on a loss of its own, which holds an object."""

    def estimate(self, problem: BilevelProblem, *args: Any) -> Any:
        settings = {"weight": SimpleNamespace(value=2.0)}

        def inner_loss(*args: Any) -> Any:
            loss, after = problem.inner_loss(*args)
            return settings["weight"].value * loss, after

        return super().estimate(replace(problem, inner_loss=inner_loss), *args)


def test_a_strategy_that_is_not_compiled_leaves_the_others_compiled(calls: list[int]) -> None:
    module = weighted()
    with pytest.warns(UserWarning, match="the strategy steps on a loss of its own, which holds an object, SimpleName"):
        assert apart(*both(module, Own(penalty=2.0))) < 2e-6
    assert not calls
    both(module)
    assert calls


def test_without_compile_nothing_is_compiled(calls: list[int]) -> None:
    module = weighted(compile=False)
    hypergradient(module, ReverseUnroll(), episode())
    assert module.functional().problem.compiler is None
    assert not calls


def test_a_run_is_freed_as_it_goes_backward() -> None:
    module = weighted()
    functional = module.functional()
    with functional.session():
        problem, phi, batches = functional.problem, functional.phi(), functional.problem.batches(episode())
        step = inner_step(problem)
        assert isinstance(step, CompiledStep)
        pulled = step.vjp(problem.start(InnerState(functional.theta()), phi), phi, batches)
        kept = weakref.ref(pulled.pull.__self__._steps[0][3][0])
        d, through = pulled.pull({name: torch.ones_like(v) for name, v in pulled.state.flat().items()}, [])
    assert d == {}
    assert through.keys() == phi.keys()
    del step
    gc.collect()
    assert not pulled.pull.__self__._steps
    assert kept is not None


def test_plain_runs(calls: list[int]) -> None:
    module = weighted(optimizer=lambda module: SGD(lr=0.3, momentum=0.9))
    functional = module.functional()
    with functional.session():
        problem, phi = functional.problem, functional.phi()
        start = problem.start(InnerState(functional.theta()), phi)
        ours = run(problem, start, phi, problem.batches(episode()))
        eager = run(replace(problem, compiler=None), start, phi, problem.batches(episode()))
    assert ours.state.steps == eager.state.steps == 3
    assert calls
    for name, value in eager.state.flat().items():
        torch.testing.assert_close(ours.state.flat()[name], value)
    torch.testing.assert_close(ours.metrics, eager.metrics)


def test_a_compiler_of_its_own_for_each_module() -> None:
    first, second = weighted(), weighted()
    assert isinstance(first.functional().compiler, Compiler)
    assert first.functional().compiler is first.functional().compiler
    assert first.functional().compiler is not second.functional().compiler


@pytest.mark.slow
@needs_inductor
@pytest.mark.usefixtures("by_inductor")
@pytest.mark.parametrize(
    ("strategy", "norm"),
    [(lambda: ReverseUnroll(checkpoint=2), nn.BatchNorm1d), (lambda: ForwardGradient(2), nn.LayerNorm)],
)
def test_inductor(
    strategy: Callable[[], HypergradientStrategy],
    norm: Callable[[int], nn.Module],
    calls: list[int],
) -> None:
    module = weighted(
        net=lambda: stacked(norm(HIDDEN), nn.Dropout(), nn.Tanh(), nn.Dropout()),
        optimizer=lambda module: SGD(lr=module.log_lr.exp(), momentum=0.9),
    )
    assert apart(*both(module, strategy())) < 1e-5
    assert calls
