"""Programs that compute one hypergradient of data cleaning, in the way of each library's own examples.

A program is made for a case, and then returns the hypergradient of the example weights each time that it is called,
always from the same start. BOAT and Betty are imported when a program of theirs is made.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import higher
import torch
import torch.nn.functional as F
import torchopt
from _peers import Upper
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

TERMS, DECAY = 10, 0.2
"""Terms of the Neumann series and iterations of CG; the L2 penalty that keeps the inner Hessian positive definite."""

Batch = tuple[Tensor, Tensor]
Estimate = Callable[[], Tensor]


class Case(NamedTuple):
    """A problem; every program builds it anew, from the same seed.

    Attributes:
        net: makes the net.
        shape: of an example.
        examples: N; all of them are in every inner batch.
        lr: the inner learning rate.
        adam: Adam as the inner optimizer, else gradient descent.
        steps: T.
    """

    net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    examples: int
    lr: float
    adam: bool = False
    steps: int = 20

    def start(self) -> tuple[nn.Module, nn.Parameter]:
        torch.manual_seed(0)
        return self.net(), nn.Parameter(torch.zeros(self.examples))

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.examples, *self.shape, generator=generator)
        return x, x.flatten(1)[:, :10].argmax(1)

    def optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        kind = torch.optim.Adam if self.adam else torch.optim.SGD
        return kind(net.parameters(), lr=self.lr)


def inner_loss(net: Callable[[Tensor], Tensor], theta: Sequence[Tensor], logits: Tensor, batch: Batch) -> Tensor:
    losses = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
    return (logits.sigmoid() * losses).mean() + DECAY / 2 * sum(value.square().sum() for value in theta)


def outer_loss(net: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def by_hand(case: Case) -> Estimate:
    (net, logits), train, test = case.start(), case.batch(0), case.batch(1)

    def estimate() -> Tensor:
        theta = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
        for _ in range(case.steps):
            loss = inner_loss(partial(functional_call, net, theta), list(theta.values()), logits, train)
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {name: value - case.lr * grad for (name, value), grad in zip(theta.items(), grads, strict=True)}
        return torch.autograd.grad(outer_loss(partial(functional_call, net, theta), test), logits)[0]

    return estimate


def with_higher(case: Case) -> Estimate:
    (net, logits), train, test = case.start(), case.batch(0), case.batch(1)
    optimizer = case.optimizer(net)

    def estimate() -> Tensor:
        with higher.innerloop_ctx(net, optimizer) as (fast, inner):
            for _ in range(case.steps):
                inner.step(inner_loss(fast, list(fast.parameters()), logits, train))
            return torch.autograd.grad(outer_loss(fast, test), logits)[0]

    return estimate


def with_torchopt(case: Case) -> Estimate:
    (net, logits), train, test = case.start(), case.batch(0), case.batch(1)
    optimizer = (torchopt.MetaAdam if case.adam else torchopt.MetaSGD)(net, lr=case.lr)
    start = torchopt.extract_state_dict(net), torchopt.extract_state_dict(optimizer)

    def estimate() -> Tensor:
        for _ in range(case.steps):
            optimizer.step(inner_loss(net, list(net.parameters()), logits, train))
        grad = torch.autograd.grad(outer_loss(net, test), logits)[0]
        torchopt.recover_state_dict(net, start[0])
        torchopt.recover_state_dict(optimizer, start[1])
        return grad

    return estimate


def with_boat(operation: str) -> Callable[[Case], Estimate]:
    """Return the program for an operation: RAD is reverse mode, NS Neumann with ``k`` + 1 terms, CG, FD DARTS."""

    def make(case: Case) -> Estimate:
        import boat_torch

        (net, logits), train, test = case.start(), case.batch(0), case.batch(1)
        upper = Upper(logits)
        config = {
            "fo_op": None,
            "gm_op": ["NGD"],
            "na_op": [operation],
            "lower_level_model": net,
            "upper_level_model": upper,
            "lower_level_var": list(net.parameters()),
            "upper_level_var": [logits],
            "lower_level_opt": case.optimizer(net),
            "upper_level_opt": torch.optim.SGD([logits], lr=0.0),
            "lower_iters": case.steps,
            "device": "cpu",
            "loss_log_path": str(Path(tempfile.mkdtemp()) / "losses.json"),
            "accumulate_grad": False,
            "copy_last_param": False,
            "return_grad": True,
            "RGT": {"truncate_iter": 0},
            "GDA": {"alpha_init": 0.0, "alpha_decay": 0.0},
            "CG": {"tolerance": 1e-30, "k": TERMS - (operation == "NS")},
            "FD": {"r": 0.01},
        }
        losses = {f"{level}_level_loss": {"function": f"{__name__}.boat_{level}_loss"} for level in ("lower", "upper")}
        problem = boat_torch.Problem(config, losses).build_ll_solver().build_ul_solver()

        def estimate() -> Tensor:
            logits.grad = None
            lower, upper_feed = ({"x": x, "y": y} for x, y in (train, test))
            return problem.run_iter(lower, upper_feed, 0)[0][0]

        return estimate

    return make


def boat_lower_loss(feed: dict[str, Tensor], upper: Any, lower: Any, params: Any = None) -> Tensor:
    net = lower if params is None else partial(lower, params=params)
    return inner_loss(net, list(lower.parameters()) if params is None else params, upper.logits, (feed["x"], feed["y"]))


def boat_upper_loss(feed: dict[str, Tensor], upper: Any, lower: Any, params: Any = None) -> Tensor:
    return outer_loss(lower if params is None else partial(lower, params=params), (feed["x"], feed["y"]))


def with_betty(kind: str, unrolled: bool = False) -> Callable[[Case], Estimate]:
    """Return the program for an implicit method, or for reverse mode (with which 0.2.1 fails, see docs/peers.md)."""

    def make(case: Case) -> Estimate:
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.problems import ImplicitProblem, IterativeProblem

        (net, logits), train, test = case.start(), case.batch(0), case.batch(1)
        found = []

        class Inner(IterativeProblem if unrolled else ImplicitProblem):
            def forward(self, x: Tensor) -> Tensor:
                return self.fmodule(self.params, self.buffers, x) if unrolled else self.module(x)

            def training_step(self, batch: Batch) -> Tensor:
                return inner_loss(self, list(self.trainable_parameters()), self.outer.module.logits, batch)

            def get_batch(self) -> Batch:
                return train

        class Outer(ImplicitProblem):
            def training_step(self, batch: Batch) -> Tensor:
                return outer_loss(self.inner, batch)

            def get_batch(self) -> Batch:
                return test

            def optimizer_step(self, *args: Any) -> None:
                found.append(self.module.logits.grad)

        settings = {"neumann_iterations": TERMS - 1, "neumann_alpha": case.lr, "cg_iterations": TERMS}
        lower = Config(type=kind, unroll_steps=case.steps, retain_graph=unrolled, **settings)
        upper = Config(retain_graph=True, first_order=not unrolled)
        problems = [
            Inner("inner", lower, module=net, optimizer=case.optimizer(net)),
            Outer("outer", upper, module=Upper(logits), optimizer=torch.optim.SGD([logits], lr=0.0)),
        ]
        dependencies = {"u2l": {problems[1]: [problems[0]]}, "l2u": {problems[0]: [problems[1]]}}
        logging.disable(logging.INFO)  # Betty's log of every problem
        options = EngineConfig(train_iters=case.steps, valid_step=case.steps + 1, strategy="cpu")
        engine = Engine(problems, options, dependencies)
        start = {name: value.clone() for name, value in net.state_dict().items()}

        def estimate() -> Tensor:
            found.clear()
            net.load_state_dict(start)
            if unrolled:
                problems[0].params = tuple(value.detach().clone().requires_grad_() for value in net.parameters())
            engine.run()
            return found[0]

        return estimate

    return make


def with_torchopt_implicit(solve: Callable[..., Any]) -> Callable[[Case], Estimate]:
    """Return the program for one of TorchOpt's linear solvers."""

    class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=solve):
        def __init__(self, logits: nn.Parameter, net: nn.Module) -> None:
            super().__init__()
            self.logits, self.net = logits, net

        def objective(self, batch: Batch, case: Case) -> Tensor:
            return inner_loss(self.net, list(self.net.parameters()), self.logits, batch)

        def solve(self, batch: Batch, case: Case) -> None:
            parameters = tuple(self.parameters())
            optimizer = torch.optim.SGD(parameters, lr=case.lr)
            with torch.enable_grad():
                for _ in range(case.steps):
                    optimizer.zero_grad()
                    self.objective(batch, case).backward(inputs=parameters)
                    optimizer.step()

    def make(case: Case) -> Estimate:
        train, test = case.batch(0), case.batch(1)

        def estimate() -> Tensor:
            net, logits = case.start()
            net.eval()  # in training mode, TorchOpt takes a module among the arguments for an outer one
            inner = Inner(logits, net)
            inner.solve(train, case)
            return torch.autograd.grad(outer_loss(inner.net, test), logits)[0]

        return estimate

    return make


def implicit_by_hand(
    solve: Callable[[Callable[[Tensor], Tensor], Tensor, float], Tensor],
) -> Callable[[Case], Estimate]:
    """Return the program for a linear solver: (v ↦ H v, d, inner learning rate) to about H⁻¹ d."""

    def make(case: Case) -> Estimate:
        (net, logits), train, test = case.start(), case.batch(0), case.batch(1)
        theta = list(net.parameters())
        start = parameters_to_vector(theta).detach().clone()

        def estimate() -> Tensor:
            vector_to_parameters(start, theta)
            for _ in range(case.steps):
                grads = torch.autograd.grad(inner_loss(net, theta, logits, train), theta)
                with torch.no_grad():
                    for value, grad in zip(theta, grads, strict=True):
                        value -= case.lr * grad
            d = parameters_to_vector(torch.autograd.grad(outer_loss(net, test), theta))
            grads = torch.autograd.grad(inner_loss(net, theta, logits, train), theta, create_graph=True)
            gradient = parameters_to_vector(grads)

            def product(vector: Tensor) -> Tensor:
                return parameters_to_vector(torch.autograd.grad(gradient, theta, vector, retain_graph=True))

            return -torch.autograd.grad(gradient, logits, solve(product, d, case.lr))[0]

        return estimate

    return make


def neumann(product: Callable[[Tensor], Tensor], b: Tensor, lr: float) -> Tensor:
    term = total = b
    for _ in range(TERMS - 1):
        term = term - lr * product(term)
        total = total + term
    return lr * total


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, lr: float) -> Tensor:
    x, r, p = torch.zeros_like(b), b, b
    for _ in range(TERMS):
        image = product(p)
        step = r.dot(r) / p.dot(image)
        x, before, r = x + step * p, r, r - step * image
        p = r + r.dot(r) / before.dot(before) * p
    return x
