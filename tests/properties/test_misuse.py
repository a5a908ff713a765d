"""Every error: raised where it is caused, before the first batch where that is possible, in the library's wording."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import (
    FSLA,
    SGD,
    Adam,
    Episode,
    ForwardGradient,
    HypergradientMonitor,
    HypergradientSchedule,
    ImplicitGradient,
    ReverseUnroll,
)
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Identity, Neumann
from tests.support.functions import Once
from tests.support.modules import NoLevels, listed, parameters, tasks, trainer
from tests.support.spoilt import EPISODE, Net, X, Y, net, without_levels, zeros


class Stream:
    """Training batches; knows whether one was asked for."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches, self.opened = batches, False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.opened = True
        return iter(self.batches)


class Bare(nn.Module):
    """Has a parameter and no ``reset_parameters``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class BareNet(Net):
    def __init__(self) -> None:
        super().__init__(inner_start="reinit")
        self.net = Bare()


class Diverging(Net):
    """Goes wrong in one quantity at a given inner step or outer evaluation."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.step = where, 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.step = -1  # the losses are evaluated once before, to see what they depend on

    def squared_once(self: Net, batch: Any) -> Tensor:
        return Once.apply(Net.inner_loss(self, batch))

    def inner_loss(self, batch: Any) -> Tensor:
        if self.where == "once":
            return self.squared_once(batch)
        return super().inner_loss(batch) + (batch[2].sum() if self.where == "inner" and len(batch) > 2 else 0)

    def outer_loss(self, batch: Any) -> Tensor:
        loss = super().outer_loss(batch)
        if self.where == "count":
            return (loss > 0).long()
        if self.where == "outer" and len(batch) > 2:
            return loss * batch[2].sum()
        if self.where == "hypergradient":
            return loss + (self.log_penalty - self.log_penalty.detach()).abs().sqrt().sum()
        return loss


BAD = torch.tensor([float("nan")])
GOOD = torch.tensor([0.0])


def solves(solution: Any, **methods: Any) -> Callable[[], Net]:
    return lambda: net(solve_inner=lambda self, batches: solution(self), inner_loss=None, **methods)


class Case(NamedTuple):
    """What is spoiled, the first words of the error, and whether it takes the first batch to see it."""

    build: Callable[[], Any]
    message: str
    callbacks: Sequence[Any] = (ReverseUnroll(),)
    error: type[Exception] = MisconfigurationError
    first: bool = False
    batches: Sequence[Any] = (EPISODE,)


FITS: dict[str, Case] = {
    # The Trainer
    "no strategy": Case(net, r"`Net` has no hypergradient strategy\. Add one", callbacks=[]),
    "two strategies": Case(
        net,
        r"Cannot use `ReverseUnroll` and `ForwardGradient` in one Trainer\. This is because",
        callbacks=[ReverseUnroll(), ForwardGradient()],
    ),
    "plain module": Case(
        NoLevels,
        r"`NoLevels` has no inner and outer level\. `ReverseUnroll` works on a `lightning_bilevel\.BilevelModule`",
    ),
    "plain module with monitor": Case(
        NoLevels,
        r"`NoLevels` has no hypergradient to monitor\. `HypergradientMonitor` works on",
        callbacks=[HypergradientMonitor()],
    ),
    # Hooks that are missing, or that should not be there
    "no inner loss": Case(
        lambda: net(inner_loss=None), r"`Net` has no `inner_loss`\. Add `def inner_loss\(self, batch\): \.\.\.`\.$"
    ),
    "no outer loss": Case(
        lambda: net(outer_loss=None), r"`Net` has no `outer_loss`\. Add `def outer_loss\(self, batch\): \.\.\.`\.$"
    ),
    "no inner optimizer": Case(
        lambda: net(configure_inner_optimizer=None),
        r"`Net` has no `configure_inner_optimizer`\. Add `def configure_inner_optimizer\(self\): return SGD",
    ),
    "no level": Case(
        without_levels, r"`Net` has no `inner_parameters`\. Add `def inner_parameters\(self\): return self\.net`, or"
    ),
    "training step": Case(
        lambda: net(training_step=lambda self, batch, batch_idx: None),
        r"Cannot use an overridden `Net\.training_step`\. This is because .*\. Write `inner_loss\(batch\)` and",
    ),
    "manual optimization": Case(
        lambda: net(automatic_optimization=property(lambda self: False, lambda self, value: None)),
        r"Cannot use manual optimization with a `BilevelModule`\. This is because .*\. Remove",
    ),
    "everything at once": Case(
        lambda: net(training_step=lambda self, batch: None, outer_loss=None, inner_loss=None),
        r"`Net` has no `outer_loss`\..*\n`Net` has no `inner_loss`\..*\nCannot use an overridden `Net\.training_step`",
    ),
    # The levels
    "no inner parameters": Case(
        lambda: net(inner_parameters=lambda self: []),
        r"`Net` has no inner parameters\. Let `inner_parameters\(\)` return parameters that require gradients",
    ),
    "no outer parameters": Case(
        lambda: net(inner_parameters=lambda self: self.parameters()),
        r"`Net` has no outer parameters\. Let `outer_parameters\(\)` return",
    ),
    "forgotten return": Case(
        lambda: net(inner_parameters=lambda self: None),
        r"Expected `Net\.inner_parameters\(\)` to be parameters or submodules of the module, got None\. Write `return",
        error=ValueError,
    ),
    "named parameters": Case(
        lambda: net(outer_parameters=lambda self: self.named_parameters()),
        r"Expected `Net\.outer_parameters\(\)` to be parameters or submodules of the module, got 'tuple'\. Write",
        error=ValueError,
    ),
    "another module's parameters": Case(
        lambda: net(inner_parameters=lambda self: nn.Linear(3, 1)),
        r"Expected `Net\.inner_parameters\(\)` to be parameters or submodules of the module, "
        r"got 'a parameter of shape \(1, 3\) from elsewhere'\. Make it",
        error=ValueError,
    ),
    "untouched outer parameter": Case(
        lambda: net(inner_loss=lambda self, batch: self.outer_loss(batch)),
        r"`Net` has no loss that depends on the outer parameters \['log_penalty'\]\. Use them in `inner_loss`",
        first=True,
    ),
    "inner loss without inner parameters": Case(
        lambda: net(inner_loss=lambda self, batch: self.log_penalty.exp().sum()),
        r"`Net` has no inner loss that depends on the inner parameters\. Use net\.weight, net\.bias in",
        first=True,
    ),
    "reinit without reset_parameters": Case(
        BareNet,
        r"`Bare` has no `reset_parameters\(\)`, which `inner_start='reinit'` calls for \['net\.weight'\]\. Define it",
    ),
    "optimizer of the inner parameters": Case(
        lambda: net(configure_optimizers=lambda self: torch.optim.Adam(self.net.parameters())),
        r"`Net` has no outer parameter in its optimizer\. Let `configure_optimizers\(\)` return",
    ),
    # What hooks return
    "inner loss of several numbers": Case(
        lambda: net(inner_loss=lambda self, batch: Net.inner_loss(self, batch)[None]),
        r"Expected `Net\.inner_loss\(batch\)` to be a 0-dim tensor, got 'a tensor of shape \(1,\)'\. Reduce it with",
        error=ValueError,
        first=True,
    ),
    "inner optimizer": Case(
        lambda: net(configure_inner_optimizer=lambda self: "sgd"),
        r"Expected `Net\.configure_inner_optimizer\(\)` to be an `InnerOptimizer` or a `torch\.optim` instance, got",
        error=ValueError,
    ),
    "solution with other names": Case(
        solves(lambda self: {"weight": self.log_penalty}),
        r"Expected `Net\.solve_inner\(batches\)` to be a mapping with the keys \['net\.bias', 'net\.weight'\], got",
        error=ValueError,
        first=True,
    ),
    "solution without names": Case(
        solves(lambda self: self.log_penalty),
        r"Expected `Net\.solve_inner\(batches\)` to be a mapping with the keys .*, got 'Tensor'\.",
        error=ValueError,
        first=True,
    ),
    "solution of other shapes": Case(
        solves(lambda self: {**zeros(self), "net.bias": self.log_penalty[0]}),
        r"Expected `Net\.solve_inner\(batches\)\['net\.bias'\]` to be of shape \(1,\), got \(\)\.",
        error=ValueError,
        first=True,
    ),
    "start of other shapes": Case(
        lambda: net(initial_inner_parameters=lambda self: {"net.bias": torch.zeros(2)}),
        r"Expected `Net\.initial_inner_parameters\(\)\['net\.bias'\]` to be of shape \(1,\), got \(2,\)\.",
        error=ValueError,
        first=True,
    ),
    "no episodes": Case(
        lambda: net(episodes=lambda self, batch: []),
        r"Expected `Net\.episodes\(batch\)` to be at least one episode, got \[\]\.",
        error=ValueError,
        first=True,
    ),
    # Batches
    "plain batch": Case(
        net,
        r"Expected `the training batch` to be an `Episode`, .*, got '(list|tuple)'\. Let `trainer.fit` or `train_data",
        error=ValueError,
        first=True,
        batches=[(X, Y)],
    ),
    "no inner batch": Case(
        net,
        r"Expected `Episode\(inner=\.\.\.\)` to be a list of at least one inner batch, got 'none'\.",
        error=ValueError,
        first=True,
        batches=[Episode([], (X, Y))],
    ),
    "inner batch without a list": Case(
        net,
        r"Expected `Episode\(inner=\.\.\.\)` to be a list of at least one inner batch, got 'Tensor'\. Write a single",
        error=ValueError,
        first=True,
        batches=[Episode(X, (X, Y))],
    ),
    "warm with several episodes": Case(
        lambda: net({"inner_start": "warm"}),
        r"Cannot use `inner_start='warm'` with 3 episodes in a batch\. This is because net\.weight would continue",
        first=True,
        batches=[tasks(3)],
    ),
    # Numbers
    "a count for a loss": Case(
        lambda: Diverging("count"),
        r"Expected `Diverging\.outer_loss\(batch\)` to be a tensor of floating-point numbers, got",
        error=ValueError,
        first=True,
    ),
    "a loss that is differentiable once": Case(
        lambda: Diverging("once"),
        r"Cannot use `ReverseUnroll` with `Once` in `Diverging\.inner_loss`\. This is because `Once` is marked",
        first=True,
    ),
    "a loss that is differentiable once, with a solver": Case(
        lambda: net(solve_inner=lambda self, batches: zeros(self), inner_loss=Diverging.squared_once),
        r"Cannot use `ImplicitGradient` with `Once` in `Net\.inner_loss`\. This is because `Once` is marked",
        first=True,
        callbacks=[ImplicitGradient(Neumann(step_size=0.1))],
    ),
    "inner loss nan": Case(
        lambda: Diverging("inner"),
        r"Expected the inner loss at step 2 of 3 to be finite, got nan\. Lower the inner learning rate",
        error=FloatingPointError,
        first=True,
        batches=[Episode([(X, Y, GOOD), (X, Y, BAD)], (X, Y))],
    ),
    "outer loss nan": Case(
        lambda: Diverging("outer"),
        r"Expected the outer loss to be finite, got nan\. Look at the outer loss",
        error=FloatingPointError,
        first=True,
        batches=[Episode([(X, Y)], (X, Y, BAD))],
    ),
    "hypergradient nan": Case(
        lambda: Diverging("hypergradient"),
        r"Expected the hypergradient of `log_penalty` to be finite, got nan or inf\. Lower the inner learning rate",
        error=FloatingPointError,
        first=True,
    ),
    # Strategies that cannot work with this module
    "steps of a solver": Case(
        solves(zeros),
        r"Cannot use `FSLA` with `solve_inner`\. This is because your solver has no inner steps\. Use",
        callbacks=[FSLA()],
    ),
    "derivatives of a black box": Case(
        solves(zeros, differentiable_solve=False),
        r"Cannot use `ReverseUnroll` with `solve_inner` and `differentiable_solve = False`\. This is because",
    ),
    "steps in a later phase": Case(
        solves(zeros),
        r"Cannot use `FSLA` with `solve_inner`\.",
        callbacks=[HypergradientSchedule([(ReverseUnroll(), 1), (FSLA(), None)])],
    ),
    "steps of a guide": Case(
        solves(zeros),
        r"Cannot use `FSLA` with `solve_inner`\.",
        callbacks=[ForwardGradient(guide=FSLA())],
    ),
    "implicit with shared": Case(
        lambda: net(inner_parameters=lambda self: self, outer_parameters=lambda self: self),
        r"Cannot use `ImplicitGradient` with parameters shared by both levels and `proximal=0`\. This is because",
        callbacks=[ImplicitGradient(Identity())],
    ),
    "implicit with a learned rate": Case(
        lambda: net(configure_inner_optimizer=lambda self: SGD(lr=self.log_penalty.exp())),
        r"Cannot use `ImplicitGradient` with an inner optimizer that depends on the outer parameters\. This is",
        callbacks=[ImplicitGradient(Neumann(step_size=0.1))],
    ),
    "adapted identity with a solver": Case(
        solves(zeros),
        r"Cannot use `Identity\(adapt=True\)` with `solve_inner`\. This is because",
        callbacks=[ImplicitGradient(Identity(adapt=True))],
    ),
    "fsla, all of it": Case(
        lambda: net(configure_inner_optimizer=lambda self: Adam(lr=self.log_penalty.exp())),
        r"Cannot use `FSLA` with an inner level that starts anew\..*\n"
        r"Cannot use `FSLA` with `inner_steps=3`\..*\n"
        r"Cannot use `FSLA` with an inner optimizer that depends on φ\..*\n"
        r"Cannot use `FSLA` with an inner optimizer with state\.",
        callbacks=[FSLA()],
    ),
    "fsla with shared": Case(
        lambda: net(inner_parameters=lambda self: self, outer_parameters=lambda self: self),
        r"Cannot use `FSLA` with parameters shared by both levels\. This is because",
        callbacks=[FSLA()],
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_fit_refuses(name):
    case = FITS[name]
    module, stream = case.build(), Stream(case.batches)
    before, flags = parameters(module), [p.requires_grad for p in module.parameters()]
    with pytest.raises(case.error, match=f"^{case.message}"):
        trainer(*case.callbacks).fit(module, stream)
    assert stream.opened == case.first
    assert [p.requires_grad for p in module.parameters()] == flags
    assert all(torch.equal(before[key], value) for key, value in parameters(module).items())


def test_the_module_that_the_cases_spoil_works():
    trainer(ReverseUnroll()).fit(net(), listed([EPISODE]))


def test_what_is_not_reset_may_start_elsewhere():
    class Module(BareNet):
        def initial_inner_parameters(self):
            return {"net.weight": self.log_penalty.exp() * torch.ones(1, 3)}

    trainer(ReverseUnroll()).fit(Module(), listed([EPISODE]))


def test_fsla_refuses_accumulation():
    message = r"^Cannot use `FSLA` with `accumulate_grad_batches=2`\. This is because"
    with pytest.raises(MisconfigurationError, match=message):
        trainer(FSLA(), accumulate_grad_batches=2).fit(net(), Stream([EPISODE]))


def test_frozen_parameters_are_named():
    module = net()
    module.net.requires_grad_(False)
    message = (
        r"^`Net` has no inner parameters but frozen ones: net\.weight, net\.bias\. Let `inner_parameters\(\)` return"
    )
    with pytest.raises(MisconfigurationError, match=message):
        trainer(ReverseUnroll()).fit(module, listed([EPISODE]))
