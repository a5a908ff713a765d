"""Data cleaning with other libraries: one function a library, each in the way of that library's own examples.

A loop holds a net (inner), the logits of the example weights (outer), and a function that takes one outer step on an
episode: ``inner_steps`` steps of the inner optimizer from where the last one ended, one hypergradient, one step of the
outer optimizer. BOAT and Betty are imported when a loop of theirs is made.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import higher
import torch
import torchopt
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from lightning_bilevel import Episode, HypergradientStrategy, ImplicitGradient, ReverseUnroll
from lightning_bilevel.linear_solvers import ConjugateGradient, Identity, Neumann
from support.cleaning import Batch, Net, inner_loss, outer_loss

PACKAGES = {"higher": "higher", "TorchOpt": "torchopt", "BOAT": "boat-torch", "Betty": "betty-ml"}
BY_HAND = "by hand"


def versions() -> dict[str, str | None]:
    """Return the version of each library; ``None`` for one that is not installed."""
    found: dict[str, str | None] = {}
    for library, package in PACKAGES.items():
        try:
            found[library] = version(package)
        except PackageNotFoundError:
            found[library] = None
    return found


class Solver(NamedTuple):
    """Settings of the linear solvers of implicit methods.

    Attributes:
        terms: of the Neumann series.
        step_size: of the Neumann series.
        iterations: of conjugate gradients.
        damping: is added to the inner Hessian for conjugate gradients, where a library can.
    """

    terms: int = 20
    step_size: float = 0.5
    iterations: int = 10
    damping: float = 0.1


@dataclass(frozen=True)
class Task:
    """What every library is given alike.

    Attributes:
        net: where the inner level starts; a loop works on a copy.
        num_examples: of the training set, each of which has a logit that starts at 0.
        inner_steps: steps of the net for each step of the weights.
        inner_lr: their learning rate.
        outer_optimizer: from the logits.
        adam: Adam as the inner optimizer, else gradient descent.
        decay: factor of the ℓ2 penalty that is part of the inner loss.
        solver: for implicit methods.
    """

    net: nn.Module
    num_examples: int
    inner_steps: int
    inner_lr: float
    outer_optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer]
    adam: bool = False
    decay: float = 0.0
    solver: Solver = Solver()

    def start(self) -> tuple[nn.Module, nn.Parameter]:
        return copy.deepcopy(self.net), nn.Parameter(torch.zeros(self.num_examples))

    def inner_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return (torch.optim.Adam if self.adam else torch.optim.SGD)(parameters, lr=self.inner_lr)

    def inner_batches(self, episode: Episode) -> Iterator[Batch]:
        return islice(cycle(episode.inner), self.inner_steps)

    def inner_loss(self, net: Net, theta: Iterable[Tensor], logits: Tensor, batch: Batch) -> Tensor:
        loss = inner_loss(net, logits, batch)
        return loss + self.decay / 2 * sum(value.square().sum() for value in theta) if self.decay else loss


class Loop(NamedTuple):
    net: nn.Module
    logits: nn.Parameter
    step: Callable[[Episode], Any]

    def hypergradient(self, episode: Episode) -> Tensor:
        """Take the first step; return what it subtracts from logits of 0: gradient descent at rate 1 is needed."""
        self.step(episode)
        return -self.logits.detach()


def by_hand(task: Task) -> Loop:
    """Return a loop of reverse mode through gradient descent."""
    net, logits = task.start()
    optimizer = task.outer_optimizer([logits])

    def step(episode: Episode) -> None:
        theta = {name: value.detach().requires_grad_() for name, value in net.named_parameters()}
        for batch in task.inner_batches(episode):
            loss = task.inner_loss(partial(functional_call, net, theta), theta.values(), logits, batch)
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {n: value - task.inner_lr * grad for (n, value), grad in zip(theta.items(), grads, strict=True)}
        logits.grad = torch.autograd.grad(outer_loss(partial(functional_call, net, theta), episode.outer), logits)[0]
        optimizer.step()
        net.load_state_dict(theta)

    return Loop(net, logits, step)


def with_higher(task: Task) -> Loop:
    net, logits = task.start()
    inner, optimizer = task.inner_optimizer(net.parameters()), task.outer_optimizer([logits])

    def step(episode: Episode) -> None:
        with higher.innerloop_ctx(net, inner) as (fast, fast_inner):
            for batch in task.inner_batches(episode):
                fast_inner.step(task.inner_loss(fast, fast.parameters(), logits, batch))
            logits.grad = torch.autograd.grad(outer_loss(fast, episode.outer), logits)[0]
            optimizer.step()
            net.load_state_dict(fast.state_dict())

    return Loop(net, logits, step)


def with_torchopt(task: Task) -> Loop:
    net, logits = task.start()
    kind = torchopt.MetaAdam if task.adam else torchopt.MetaSGD
    inner, optimizer = kind(net, lr=task.inner_lr), task.outer_optimizer([logits])

    def step(episode: Episode) -> None:
        for batch in task.inner_batches(episode):
            inner.step(task.inner_loss(net, net.parameters(), logits, batch))
        logits.grad = torch.autograd.grad(outer_loss(net, episode.outer), logits)[0]
        optimizer.step()
        torchopt.stop_gradient(net)
        torchopt.stop_gradient(inner)

    return Loop(net, logits, step)


def with_torchopt_implicit(kind: str) -> Callable[[Task], Loop]:
    """Return a loop of TorchOpt's implicit gradient with one of its linear solvers, ``"Neumann"`` or ``"CG"``."""

    def make(task: Task) -> Loop:
        solver = task.solver
        if kind == "Neumann":
            linear_solve = torchopt.linear_solve.solve_inv(ns=True, maxiter=solver.terms - 1, alpha=solver.step_size)
        else:
            linear_solve = torchopt.linear_solve.solve_cg(maxiter=solver.iterations, rtol=0.0, ridge=solver.damping)

        class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=linear_solve):  # type: ignore[call-arg,misc]
            def __init__(self, net: nn.Module, logits: nn.Parameter) -> None:
                super().__init__()
                self.logits, self.net = logits, net

            def objective(self, batches: Sequence[Batch]) -> Tensor:
                return task.inner_loss(self.net, self.net.parameters(), self.logits, batches[-1])

            def solve(self, batches: Sequence[Batch]) -> None:
                parameters = tuple(self.parameters())
                optimizer = task.inner_optimizer(parameters)
                with torch.enable_grad():
                    for batch in batches:
                        optimizer.zero_grad()
                        task.inner_loss(self.net, parameters, self.logits, batch).backward(inputs=parameters)
                        optimizer.step()

        net, logits = task.start()
        net.eval()  # in training mode, TorchOpt takes a module among the arguments for an outer one
        inner, optimizer = Inner(net, logits), task.outer_optimizer([logits])

        def step(episode: Episode) -> None:
            inner.solve(list(task.inner_batches(episode)))
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


def with_betty(kind: str, unrolled: bool = False) -> Callable[[Task], Loop]:
    """Return a loop of an implicit method of Betty, or of its reverse mode. Its conjugate gradients know no damping."""

    def make(task: Task) -> Loop:
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.problems import ImplicitProblem, IterativeProblem

        net, logits = task.start()
        feed: dict[str, Iterator[Batch]] = {}

        class Inner(IterativeProblem if unrolled else ImplicitProblem):  # type: ignore[misc]
            def forward(self, x: Tensor) -> Tensor:
                return self.fmodule(self.params, self.buffers, x) if unrolled else self.module(x)

            def training_step(self, batch: Batch) -> Tensor:
                return task.inner_loss(self, self.trainable_parameters(), self.outer.module.logits, batch)

            def get_batch(self) -> Batch:
                return next(feed["inner"])

        class Outer(ImplicitProblem):  # type: ignore[misc]
            def training_step(self, batch: Batch) -> Tensor:
                return outer_loss(self.inner, batch)

            def get_batch(self) -> Batch:
                return next(feed["outer"])

        lower = Config(
            type=kind,
            unroll_steps=task.inner_steps,
            retain_graph=unrolled,
            neumann_iterations=task.solver.terms - 1,
            neumann_alpha=task.solver.step_size,
            cg_iterations=task.solver.iterations,
        )
        optimizer = task.inner_optimizer(net.parameters())
        upper = Upper(logits)
        problems = [
            Inner("inner", lower, module=net, optimizer=optimizer),
            Outer("outer", Config(), module=upper, optimizer=task.outer_optimizer([logits])),
        ]
        dependencies = {"u2l": {problems[1]: [problems[0]]}, "l2u": {problems[0]: [problems[1]]}}
        logging.disable(logging.INFO)  # Betty's log of every problem
        try:
            engine = Engine(problems, EngineConfig(strategy="cpu"), dependencies)
        finally:
            logging.disable(logging.NOTSET)

        def step(episode: Episode) -> None:
            feed.update(inner=iter(cycle(episode.inner)), outer=iter([episode.outer]))
            for _ in range(task.inner_steps):
                engine.train_step()

        return Loop(net, logits, step)

    return make


def with_boat(operation: str) -> Callable[[Task], Loop]:
    """Return a loop of one of BOAT's numerical operations: RAD is reverse mode, NS, CG and FD (DARTS) are implicit."""

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
            "lower_level_opt": task.inner_optimizer(net.parameters()),
            "upper_level_opt": task.outer_optimizer([logits]),
            "lower_iters": task.inner_steps,
            "device": "cpu",
            "loss_log_path": str(Path(tempfile.mkdtemp()) / "losses.json"),
            "accumulate_grad": False,
            "copy_last_param": True,
            "return_grad": False,
            "RGT": {"truncate_iter": 0},
            "GDA": {"alpha_init": 0.0, "alpha_decay": 0.0},
            "CG": {"tolerance": 1e-30, "k": task.solver.iterations if operation == "CG" else task.solver.terms - 1},
            "FD": {"r": 0.01},
        }
        losses = {f"{level}_level_loss": {"function": f"{__name__}.boat_{level}_loss"} for level in ("lower", "upper")}
        problem = boat_torch.Problem(config, losses).build_ll_solver().build_ul_solver()

        def step(episode: Episode) -> None:
            problem.run_iter({"task": task, "batches": cycle(episode.inner)}, {"batch": episode.outer}, 0)

        return Loop(net, logits, step)

    return make


def boat_lower_loss(feed: dict[str, Any], upper: Any, lower: Any, params: Any = None) -> Tensor:
    """BOAT has one feed for all inner steps, so that the batches of the steps are drawn here."""
    net, theta = (lower, lower.parameters()) if params is None else (partial(lower, params=params), params)
    return feed["task"].inner_loss(net, theta, upper.logits, next(feed["batches"]))


def boat_upper_loss(feed: dict[str, Any], upper: Any, lower: Any, params: Any = None) -> Tensor:
    return outer_loss(lower if params is None else partial(lower, params=params), feed["batch"])


def implicit_by_hand(solve: Callable[[Callable[[Tensor], Tensor], Tensor, Solver], Tensor]) -> Callable[[Task], Loop]:
    """Return a loop with a linear solver: (v ↦ H v, d, settings) to about H⁻¹ d, at the last inner batch."""

    def make(task: Task) -> Loop:
        net, logits = task.start()
        theta, optimizer = list(net.parameters()), task.outer_optimizer([logits])

        def step(episode: Episode) -> None:
            for batch in task.inner_batches(episode):
                grads = torch.autograd.grad(task.inner_loss(net, theta, logits, batch), theta)
                with torch.no_grad():
                    for value, grad in zip(theta, grads, strict=True):
                        value -= task.inner_lr * grad
            d = parameters_to_vector(torch.autograd.grad(outer_loss(net, episode.outer), theta))
            grads = torch.autograd.grad(task.inner_loss(net, theta, logits, batch), theta, create_graph=True)
            gradient = parameters_to_vector(grads)

            def product(vector: Tensor) -> Tensor:
                return parameters_to_vector(torch.autograd.grad(gradient, theta, vector, retain_graph=True))

            logits.grad = -torch.autograd.grad(gradient, logits, solve(product, d, task.solver))[0]
            optimizer.step()

        return Loop(net, logits, step)

    return make


def neumann(product: Callable[[Tensor], Tensor], b: Tensor, solver: Solver) -> Tensor:
    term = total = b
    for _ in range(solver.terms - 1):
        term = term - solver.step_size * product(term)
        total = total + term
    return solver.step_size * total


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, solver: Solver) -> Tensor:
    """Return H⁻¹ b, without damping."""
    x, r, p = torch.zeros_like(b), b, b
    for _ in range(solver.iterations):
        image = product(p)
        step = r.dot(r) / p.dot(image)
        x, before, r = x + step * p, r, r - step * image
        p = r + r.dot(r) / before.dot(before) * p
    return x


SAME: dict[str, Callable[[Task], HypergradientStrategy]] = {
    "reverse": lambda task: ReverseUnroll(),
    "Neumann": lambda task: ImplicitGradient(Neumann(task.solver.terms, step_size=task.solver.step_size)),
    "Neumann at the inner rate": lambda task: ImplicitGradient(Neumann(task.solver.terms, step_size=task.inner_lr)),
    "CG": lambda task: ImplicitGradient(
        ConjugateGradient(task.solver.iterations, tol=1e-12, damping=task.solver.damping)
    ),
    "identity": lambda task: ImplicitGradient(Identity()),
}
"""What of ours computes the same."""

ROUNDING, DIFFERENCES = 1e-3, 2e-2
"""Relative differences that count as the same: of float32, and of a derivative by finite differences."""


class Peer(NamedTuple):
    """A library's program.

    Attributes:
        library: whose it is.
        method: what it computes.
        make: builds its loop.
        same_as: the entry of ``SAME`` whose estimate that is, whatever the task; ``None`` where none is.
        tolerance: the relative difference from it that counts as none.
    """

    library: str
    method: str
    make: Callable[[Task], Loop]
    same_as: str | None
    tolerance: float = ROUNDING

    @property
    def name(self) -> str:
        return f"{self.library}, {self.method}"

    @property
    def installed(self) -> bool:
        return self.library == BY_HAND or versions().get(self.library) is not None


# BOAT's Neumann series steps by the inner learning rate. Conjugate gradients cannot be damped in BOAT, in Betty and by
# hand, and a net's inner Hessian is indefinite.
PEERS = {
    peer.name: peer
    for peer in (
        Peer(BY_HAND, "reverse", by_hand, "reverse"),
        Peer("higher", "reverse", with_higher, "reverse"),
        Peer("TorchOpt", "reverse", with_torchopt, "reverse"),
        Peer("BOAT", "reverse", with_boat("RAD"), "reverse"),
        Peer("Betty", "reverse", with_betty("darts", unrolled=True), "reverse"),
        Peer(BY_HAND, "Neumann", implicit_by_hand(neumann), "Neumann"),
        Peer("TorchOpt", "Neumann", with_torchopt_implicit("Neumann"), "Neumann"),
        Peer("BOAT", "Neumann", with_boat("NS"), "Neumann at the inner rate"),
        Peer("Betty", "Neumann", with_betty("neumann"), "Neumann"),
        Peer(BY_HAND, "CG", implicit_by_hand(conjugate_gradient), None),
        Peer("TorchOpt", "CG", with_torchopt_implicit("CG"), "CG"),
        Peer("BOAT", "CG", with_boat("CG"), None),
        Peer("Betty", "CG", with_betty("cg"), None),
        Peer("BOAT", "identity", with_boat("FD"), "identity", DIFFERENCES),
        Peer("Betty", "identity", with_betty("darts"), "identity", DIFFERENCES),
    )
}
