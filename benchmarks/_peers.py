"""Data cleaning with other libraries: one function a library, each in the way of that library's own examples.

A loop holds a net (inner), the logits of the example weights (outer), and a function that takes one outer step on an
episode: ``inner_steps`` steps of gradient descent from where the last one ended, one hypergradient, one step of the
outer optimizer.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import higher
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn
from torch.func import functional_call

from lightning_bilevel import Episode, ImplicitGradient, ReverseUnroll
from lightning_bilevel.linear_solvers import ConjugateGradient, Neumann

Batch = Any
Net = Callable[[Tensor], Tensor]

TERMS, NEUMANN_STEP = 20, 0.5
"""Terms of a Neumann series, and its step."""
ITERATIONS = 10
"""Iterations of conjugate gradients."""
DAMPING = 0.1
"""Added to the inner Hessian for conjugate gradients, where a library can."""


@dataclass(frozen=True)
class Task:
    """What every library is given alike.

    Attributes:
        net: where the inner level starts; a loop works on a copy.
        num_examples: of the training set, each of which has a logit that starts at 0.
        inner_steps: steps of the net for each step of the weights.
        inner_lr: their learning rate.
        outer_optimizer: from the logits.
    """

    net: nn.Module
    num_examples: int
    inner_steps: int
    inner_lr: float
    outer_optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer]

    def start(self) -> tuple[nn.Module, nn.Parameter]:
        return copy.deepcopy(self.net), nn.Parameter(torch.zeros(self.num_examples))


class Loop(NamedTuple):
    net: nn.Module
    logits: nn.Parameter
    step: Callable[[Episode], Any]


def inner_loss(net: Net, logits: Tensor, batch: Batch) -> Tensor:
    x, y, index = batch
    return (logits[index].sigmoid() * F.cross_entropy(net(x), y, reduction="none")).mean()


def outer_loss(net: Net, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def by_hand(task: Task) -> Loop:
    net, logits = task.start()
    optimizer = task.outer_optimizer([logits])

    def step(episode: Episode) -> None:
        theta = {name: value.detach().requires_grad_() for name, value in net.named_parameters()}
        for _, batch in zip(range(task.inner_steps), cycle(episode.inner), strict=False):
            loss = inner_loss(partial(functional_call, net, theta), logits, batch)
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {n: value - task.inner_lr * grad for (n, value), grad in zip(theta.items(), grads, strict=True)}
        logits.grad = torch.autograd.grad(outer_loss(partial(functional_call, net, theta), episode.outer), logits)[0]
        optimizer.step()
        net.load_state_dict(theta)

    return Loop(net, logits, step)


def with_higher(task: Task) -> Loop:
    net, logits = task.start()
    inner, optimizer = torch.optim.SGD(net.parameters(), lr=task.inner_lr), task.outer_optimizer([logits])

    def step(episode: Episode) -> None:
        with higher.innerloop_ctx(net, inner) as (fast, fast_inner):
            for _, batch in zip(range(task.inner_steps), cycle(episode.inner), strict=False):
                fast_inner.step(inner_loss(fast, logits, batch))
            logits.grad = torch.autograd.grad(outer_loss(fast, episode.outer), logits)[0]
            optimizer.step()
            net.load_state_dict(fast.state_dict())

    return Loop(net, logits, step)


def with_torchopt(task: Task) -> Loop:
    net, logits = task.start()
    inner, optimizer = torchopt.MetaSGD(net, lr=task.inner_lr), task.outer_optimizer([logits])

    def step(episode: Episode) -> None:
        for _, batch in zip(range(task.inner_steps), cycle(episode.inner), strict=False):
            inner.step(inner_loss(net, logits, batch))
        logits.grad = torch.autograd.grad(outer_loss(net, episode.outer), logits)[0]
        optimizer.step()
        torchopt.stop_gradient(net)
        torchopt.stop_gradient(inner)

    return Loop(net, logits, step)


def with_torchopt_implicit(solver: Any) -> Callable[[Task], Loop]:
    """Return a loop of TorchOpt's implicit gradient with one of its linear solvers."""

    def make(task: Task) -> Loop:
        class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=solver):  # type: ignore[call-arg,misc]
            def __init__(self, net: nn.Module, logits: nn.Parameter) -> None:
                super().__init__()
                self.logits, self.net = logits, net

            def objective(self, batches: Sequence[Batch]) -> Tensor:
                return inner_loss(self.net, self.logits, batches[-1])

            def solve(self, batches: Sequence[Batch]) -> None:
                parameters = tuple(self.parameters())
                optimizer = torch.optim.SGD(parameters, lr=task.inner_lr)
                with torch.enable_grad():
                    for batch in batches:
                        optimizer.zero_grad()
                        inner_loss(self.net, self.logits, batch).backward(inputs=parameters)
                        optimizer.step()

        net, logits = task.start()
        net.eval()  # in training mode, TorchOpt takes a module among the arguments for an outer one
        inner, optimizer = Inner(net, logits), task.outer_optimizer([logits])

        def step(episode: Episode) -> None:
            batches = [batch for _, batch in zip(range(task.inner_steps), cycle(episode.inner), strict=False)]
            inner.solve(batches)
            logits.grad = torch.autograd.grad(outer_loss(inner.net, episode.outer), logits)[0]
            optimizer.step()
            torchopt.stop_gradient(inner)

        return Loop(net, logits, step)

    return make


class Upper(nn.Module):
    """The logits as a module, as Betty and BOAT want it."""

    def __init__(self, logits: nn.Parameter) -> None:
        super().__init__()
        self.logits = logits


def with_betty(kind: str) -> Callable[[Task], Loop]:
    """Return a loop of one of Betty's implicit methods. Its conjugate gradients know no damping."""

    def make(task: Task) -> Loop:
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.problems import ImplicitProblem

        net, logits = task.start()
        feed: dict[str, Iterator[Batch]] = {}

        class Inner(ImplicitProblem):  # type: ignore[misc]
            def training_step(self, batch: Batch) -> Tensor:
                return inner_loss(self.module, self.outer.module.logits, batch)

            def get_batch(self) -> Batch:
                return next(feed["inner"])

        class Outer(ImplicitProblem):  # type: ignore[misc]
            def training_step(self, batch: Batch) -> Tensor:
                return outer_loss(self.inner.module, batch)

            def get_batch(self) -> Batch:
                return next(feed["outer"])

        lower = Config(
            type=kind,
            unroll_steps=task.inner_steps,
            neumann_iterations=TERMS - 1,
            neumann_alpha=NEUMANN_STEP,
            cg_iterations=ITERATIONS,
        )
        sgd = torch.optim.SGD(net.parameters(), lr=task.inner_lr)
        upper = Upper(logits)
        problems = [
            Inner("inner", lower, module=net, optimizer=sgd),
            Outer("outer", Config(), module=upper, optimizer=task.outer_optimizer([logits])),
        ]
        dependencies = {"u2l": {problems[1]: [problems[0]]}, "l2u": {problems[0]: [problems[1]]}}
        logging.disable(logging.INFO)  # Betty's log of every problem
        engine = Engine(problems, EngineConfig(strategy="cpu"), dependencies)
        logging.disable(logging.NOTSET)

        def step(episode: Episode) -> None:
            feed.update(inner=iter(cycle(episode.inner)), outer=iter([episode.outer]))
            for _ in range(task.inner_steps):
                engine.train_step()

        return Loop(net, logits, step)

    return make


def with_boat(operation: str) -> Callable[[Task], Loop]:
    """Return a loop of one of BOAT's numerical operations: RAD is reverse mode, NS and CG are implicit."""

    def make(task: Task) -> Loop:
        import boat_torch

        net, logits = task.start()
        config = {
            "fo_op": None,
            "gm_op": ["NGD"],
            "na_op": [operation],
            "lower_level_model": net,
            "upper_level_model": Upper(logits),
            "lower_level_var": list(net.parameters()),
            "upper_level_var": [logits],
            "lower_level_opt": torch.optim.SGD(net.parameters(), lr=task.inner_lr),
            "upper_level_opt": task.outer_optimizer([logits]),
            "lower_iters": task.inner_steps,
            "device": "cpu",
            "loss_log_path": str(Path(tempfile.mkdtemp()) / "losses.json"),
            "accumulate_grad": False,
            "copy_last_param": True,
            "return_grad": False,
            "RGT": {"truncate_iter": 0},
            "GDA": {"alpha_init": 0.0, "alpha_decay": 0.0},
            "CG": {"tolerance": 1e-10, "k": ITERATIONS if operation == "CG" else TERMS - 1},
        }
        losses = {f"{level}_level_loss": {"function": f"{__name__}.boat_{level}_loss"} for level in ("lower", "upper")}
        problem = boat_torch.Problem(config, losses).build_ll_solver().build_ul_solver()

        def step(episode: Episode) -> None:
            problem.run_iter({"batches": cycle(episode.inner)}, {"batch": episode.outer}, 0)

        return Loop(net, logits, step)

    return make


def boat_lower_loss(feed: dict[str, Any], upper: Any, lower: Any, params: Any = None) -> Tensor:
    """BOAT has one feed for all inner steps, so that the batches of the steps are drawn here."""
    return inner_loss(lower if params is None else partial(lower, params=params), upper.logits, next(feed["batches"]))


def boat_upper_loss(feed: dict[str, Any], upper: Any, lower: Any, params: Any = None) -> Tensor:
    return outer_loss(lower if params is None else partial(lower, params=params), feed["batch"])


def torchopt_neumann() -> Any:
    return torchopt.linear_solve.solve_inv(ns=True, maxiter=TERMS - 1, alpha=NEUMANN_STEP)


def torchopt_cg() -> Any:
    return torchopt.linear_solve.solve_cg(maxiter=ITERATIONS, rtol=0.0, ridge=DAMPING)


SAME = {
    "reverse": lambda lr: ReverseUnroll(),
    "Neumann": lambda lr: ImplicitGradient(Neumann(TERMS, step_size=NEUMANN_STEP)),
    "Neumann at the inner rate": lambda lr: ImplicitGradient(Neumann(TERMS, step_size=lr)),
    "CG": lambda lr: ImplicitGradient(ConjugateGradient(ITERATIONS, damping=DAMPING)),
}
"""What of ours computes the same, from the inner learning rate."""


class Peer(NamedTuple):
    """A library's loop.

    Attributes:
        same_as: the entry of ``SAME`` whose estimate it computes; ``None`` where none does.
        make: builds it.
        package: what has to be installed, if not all who run benchmarks have it.
    """

    same_as: str | None
    make: Callable[[Task], Loop]
    package: str | None = None

    @property
    def installed(self) -> bool:
        return self.package is None or find_spec(self.package) is not None


# BOAT's Neumann series steps by the inner learning rate. Neither BOAT nor Betty can damp conjugate gradients,
# and a net's inner Hessian is indefinite.
PEERS = {
    "by hand, reverse": Peer("reverse", by_hand),
    "higher, reverse": Peer("reverse", with_higher),
    "TorchOpt, reverse": Peer("reverse", with_torchopt),
    "BOAT, reverse": Peer("reverse", with_boat("RAD"), "boat_torch"),
    "TorchOpt, Neumann": Peer("Neumann", with_torchopt_implicit(torchopt_neumann())),
    "BOAT, Neumann": Peer("Neumann at the inner rate", with_boat("NS"), "boat_torch"),
    "Betty, Neumann": Peer("Neumann", with_betty("neumann"), "betty"),
    "TorchOpt, CG": Peer("CG", with_torchopt_implicit(torchopt_cg())),
    "BOAT, CG": Peer(None, with_boat("CG"), "boat_torch"),
    "Betty, CG": Peer(None, with_betty("cg"), "betty"),
}
