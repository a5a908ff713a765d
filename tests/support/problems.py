"""Bilevel problems whose hypergradients are known: in closed form, or as differences of a loop in plain PyTorch.

:func:`train` and :func:`finite_difference` are the independent oracles: they use ``torch.optim``'s own in-place steps
and no code of the package but the user's losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bilevel import SGD, Adagrad, Adam, AdamW, BilevelModule, Episode, NAdam, RMSprop, tree
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.problem import Hypergradient
from lightning_bilevel.tree import Params
from tests.support.seeds import forked, masks

DIFFERENCE = 1e-5
"""Step of central differences in float64: truncation is then about 1e-10, rounding 1e-11."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int) -> Tensor:
    """Return standard normal numbers in float64."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def assert_close(actual: Params, expected: Params, rtol: float = 1e-9) -> None:
    """Compare tensor by tensor, relative to the largest entry of each."""
    assert list(actual) == list(expected)
    for name, value in expected.items():
        atol = rtol * float(value.abs().max()) + 1e-4 * rtol
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- The independent oracles ---


class Problem(BilevelModule):
    """A bilevel module that also knows its inner optimizer as a plain one."""

    def torch_optimizer(self) -> Any:
        """Return an object whose ``step()`` changes the inner parameters in place, from their ``grad``."""
        raise NotImplementedError

    def copy(self) -> Problem:
        return deepcopy(self)

    def outer_named(self) -> Params:
        return self._named(self.outer_parameters())

    def inner_named(self) -> Params:
        return self._named(self.inner_parameters())

    def _named(self, parameters: Any) -> Params:
        ids = {id(parameter) for parameter in parameters}
        return {name: parameter for name, parameter in self.named_parameters() if id(parameter) in ids}


def train(module: Problem, episode: Episode) -> Problem:
    """Return a trained copy of ``module``: T in-place steps from Ω_0(φ)."""
    trained = module.copy()
    theta = trained.inner_named()
    with torch.no_grad():
        for name, value in trained.initial_inner_parameters().items():
            theta[name].copy_(value)
    descend(trained, trained.torch_optimizer(), episode)
    return trained


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors of a dtype where none is given."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def descend(module: Problem, optimizer: Any, episode: Episode) -> None:
    """Take T inner steps in place."""
    theta = module.inner_named()
    anchors = {name: theta[name].detach().clone() for name in module.outer_named() if name in theta}
    with default_dtype(torch.float64):  # in which torch's NAdam keeps its product of momenta
        _descend(module, optimizer, episode, theta, anchors)


def _descend(module: Problem, optimizer: Any, episode: Episode, theta: Params, anchors: Params) -> None:
    for step in range(module.inner_steps):
        loss = module.inner_loss(episode.inner[step % len(episode.inner)])
        for name, anchor in anchors.items():
            loss = loss + module.proximal / 2 * (theta[name] - anchor).square().sum()
        grads = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
        for parameter, grad in zip(theta.values(), grads, strict=True):
            parameter.grad = grad
        optimizer.step()


def plain_value(module: Problem, episode: Episode, seed: int = 0) -> float:
    """Return h(φ) = f(θ_T(φ), φ), with the masks of an estimate under ``seed``."""
    with forked(masks(seed)):
        trained = train(module, episode)
        return trained.outer_loss(episode.outer).item()


def finite_difference(module: Problem, episode: Episode, seed: int = 0) -> Params:
    """Return ∇h(φ) by central differences, one coordinate at a time."""
    grads = {}
    for name, parameter in module.outer_named().items():
        units = torch.eye(parameter.numel(), dtype=parameter.dtype).reshape(-1, *parameter.shape)
        slopes = [directional_difference(module, episode, {name: unit}, seed) for unit in units]
        grads[name] = torch.tensor(slopes, dtype=parameter.dtype).reshape(parameter.shape)
    return grads


def directional_difference(module: Problem, episode: Episode, direction: Params, seed: int = 0) -> float:
    """Return ⟨∇h(φ), v⟩ by one central difference, for a v that may leave parameters out."""
    ahead, behind = (
        perturbed(module, direction, sign * DIFFERENCE, lambda: plain_value(module, episode, seed)) for sign in (1, -1)
    )
    return (ahead - behind) / (2 * DIFFERENCE)


def perturbed(module: nn.Module, direction: Params, scale: float, evaluate: Callable[[], float]) -> float:
    """Return ``evaluate()`` with the parameters changed in place by ``scale * direction``, and put them back."""
    before = {name: module.get_parameter(name).detach().clone() for name in direction}
    with torch.no_grad():
        for name, value in direction.items():
            module.get_parameter(name).add_(value, alpha=scale)
    try:
        return evaluate()
    finally:
        with torch.no_grad():
            for name, value in before.items():
                module.get_parameter(name).copy_(value)


# --- (a) A quadratic: everything in closed form ---


class Solution(NamedTuple):
    """θ_T, h and ∇h."""

    theta: Tensor
    value: Tensor
    grads: Params


def assert_optimum(found: Hypergradient, optimum: Solution, rtol: float = 1e-10) -> None:
    """Compare with the solution of a problem with one inner parameter."""
    assert_close(found.grads, optimum.grads, rtol)
    assert_close(found.state.params, dict.fromkeys(found.state.params, optimum.theta), rtol)
    torch.testing.assert_close(found.value, optimum.value)


class Quadratic(Problem):
    """g = ½ θᵀAθ − θᵀ(Bφ + c) and f = ½‖Cθ − e‖² + ½ρ‖φ‖²; c is the inner batch and e the outer one.

    With ``shared``, θ_0 is an outer parameter too, and ``proximal`` adds λ/2 ‖θ − θ_0‖² to g.
    """

    def __init__(
        self,
        inner_steps: int = 5,
        lr: float = 0.2,
        momentum: float = 0.0,
        shared: bool = False,
        proximal: float = 0.0,
        inner_size: int = 4,
        outer_size: int = 3,
    ) -> None:
        super().__init__(inner_steps, inner_start="reset", proximal=proximal)
        self.lr, self.momentum, self.shared, self.rho = lr, momentum, shared, 0.3
        root = draw(inner_size, inner_size, seed=1)
        self.A = root @ root.T / inner_size + 0.3 * torch.eye(inner_size, dtype=torch.float64)
        self.B, self.C = draw(inner_size, outer_size, seed=2), draw(5, inner_size, seed=3)
        self.theta = nn.Parameter(draw(inner_size, seed=4))
        self.phi = nn.Parameter(draw(outer_size, seed=5))

    def inner_parameters(self):
        return [self.theta]

    def outer_parameters(self):
        return [self.theta, self.phi] if self.shared else [self.phi]

    def inner_loss(self, batch):
        return 0.5 * self.theta @ self.A @ self.theta - self.theta @ (self.B @ self.phi + batch)

    def outer_loss(self, batch):
        return 0.5 * (self.C @ self.theta - batch).square().sum() + 0.5 * self.rho * self.phi.square().sum()

    def configure_inner_optimizer(self):
        return SGD(lr=self.lr, momentum=self.momentum)

    def torch_optimizer(self):
        return torch.optim.SGD([self.theta], lr=self.lr, momentum=self.momentum)

    def episode(self, seed: int = 0) -> Episode:
        return Episode([draw(len(self.theta), seed=10 + seed)], draw(5, seed=20 + seed))

    @property
    def hessian(self) -> Tensor:
        """A, with λ on its diagonal."""
        return self.A + self.proximal * torch.eye(len(self.A), dtype=torch.float64)

    def solution(self, episode: Episode) -> Solution:
        """Return θ_T and ∇h in closed form, for gradient descent and heavy-ball momentum.

        With momentum m, s = (θ, m) and b = Bφ + c (+ λθ_0): m ← μm + Aθ − b and θ ← θ − ηm, so that s ← Fs + Gb,
        s_T = Fᵀs_0 + (I − F)⁻¹(I − F^T) G b.
        """
        size, eye = len(self.A), torch.eye(len(self.A), dtype=torch.float64)
        gradient = torch.cat([self.hessian, self.momentum * eye], dim=1)
        transition = torch.cat([torch.cat([eye, 0 * eye], dim=1) - self.lr * gradient, gradient])
        push = torch.cat([self.lr * eye, -eye])
        power = torch.linalg.matrix_power(transition, self.inner_steps)
        identity = torch.eye(2 * size, dtype=torch.float64)
        by_start = power[:size, :size]
        by_b = torch.linalg.solve(identity - transition, (identity - power) @ push)[:size]
        theta = by_start @ self.theta.detach() + by_b @ self._b(episode)
        return self._judge(episode, theta, by_start, by_b)

    def optimum(self, episode: Episode) -> Solution:
        """Return what :meth:`solution` tends to for T → ∞."""
        by_b = torch.linalg.inv(self.hessian)
        return self._judge(episode, by_b @ self._b(episode), torch.zeros_like(by_b), by_b)

    def implicit(self, episode: Episode, theta: Tensor) -> Params:
        """Return c − d H⁻¹ ∂²g/∂θ∂φ at ``theta``: the implicit hypergradient, exact where ``theta`` is optimal."""
        by_b = torch.linalg.inv(self.hessian)
        return self._judge(episode, theta, torch.zeros_like(by_b), by_b).grads

    def _b(self, episode: Episode) -> Tensor:
        anchor = self.proximal * self.theta if self.shared else 0
        return (self.B @ self.phi + episode.inner[0] + anchor).detach()

    def _judge(self, episode: Episode, theta: Tensor, by_start: Tensor, by_b: Tensor) -> Solution:
        """Return f and ∇h at θ_T = ``theta``, whose derivatives by θ_0 and by b are the matrices."""
        phi, residual = self.phi.detach(), self.C @ theta - episode.outer
        d = self.C.T @ residual
        grads = {"phi": self.B.T @ by_b.T @ d + self.rho * phi}
        if self.shared:
            grads = {"theta": by_start.T @ d + self.proximal * by_b.T @ d, **grads}
        value = 0.5 * residual.square().sum() + 0.5 * self.rho * phi.square().sum()
        return Solution(theta, value, grads)


# --- (b) Ridge regression: a user's own solver ---


class Ridge(Problem):
    """g = ½‖Xw − y‖² + ½ Σ e^{φ_i} w_i² and f = ½‖Xw − y‖² on held-out data."""

    def __init__(self, lr: float = 0.1, **options: Any) -> None:
        super().__init__(**{"inner_start": "reset", **options})
        self.lr = lr
        self.weight = nn.Parameter(draw(3, seed=1))
        self.log_penalty = nn.Parameter(0.5 * draw(3, seed=2))

    def inner_parameters(self):
        return [self.weight]

    def inner_loss(self, batch):
        return self.outer_loss(batch) + 0.5 * (self.log_penalty.exp() * self.weight.square()).sum()

    def outer_loss(self, batch):
        x, y = batch
        return 0.5 * (x @ self.weight - y).square().sum()

    def configure_inner_optimizer(self):
        return SGD(lr=self.lr)

    def torch_optimizer(self):
        return torch.optim.SGD([self.weight], lr=self.lr)

    def episode(self, seed: int = 0) -> Episode:
        inner, outer = ((draw(6, 3, seed=s), draw(6, seed=s + 1)) for s in (30 + seed, 40 + seed))
        return Episode([inner], outer)

    def optimum(self, episode: Episode) -> Solution:
        """Return w*, f(w*) and ∇h, from dw/dφ_i = −H⁻¹ e^{φ_i} w_i."""
        (x, y), (outer_x, outer_y) = episode.inner[0], episode.outer
        penalty = self.log_penalty.detach().exp()
        hessian = x.T @ x + torch.diag(penalty)
        weight = torch.linalg.solve(hessian, x.T @ y)
        residual = outer_x @ weight - outer_y
        grad = -torch.linalg.solve(hessian, outer_x.T @ residual) * penalty * weight
        return Solution(weight, 0.5 * residual.square().sum(), {"log_penalty": grad})


class RidgeSolver(Ridge):
    """The same with a differentiable closed-form solver in place of the inner loop."""

    def solve_inner(self, batches):
        ((x, y),) = batches
        return {"weight": torch.linalg.solve(x.T @ x + torch.diag(self.log_penalty.exp()), x.T @ y)}


class RidgeBlackBox(RidgeSolver):
    """The same with a solver outside of PyTorch."""

    differentiable_solve = False

    def solve_inner(self, batches):
        (x, y), penalty = (value.numpy() for value in batches[0]), self.log_penalty.detach().exp().numpy()
        return {"weight": torch.from_numpy(np.linalg.solve(x.T @ x + np.diag(penalty), x.T @ y))}


# --- (c) A small MLP: every inner optimizer, hyperparameters learned, shared or not, tied or not ---


class Inner(NamedTuple):
    """An inner optimizer: its class, what is learned of it, and its flags."""

    kind: type[InnerOptimizer]
    hyperparameters: dict[str, float]
    flags: dict[str, bool] = {}  # noqa: RUF012

    def arguments(self, values: Any) -> dict[str, Any]:
        """Return the arguments of the constructor with ``values`` for the hyperparameters."""
        arguments = dict(zip(self.hyperparameters, values, strict=True)) | self.flags
        if "beta1" in arguments:
            arguments["betas"] = arguments.pop("beta1"), arguments.pop("beta2")
        return arguments


ADAM = {"lr": 0.1, "beta1": 0.7, "beta2": 0.9, "eps": 0.01, "weight_decay": 0.05}

INNER_OPTIMIZERS: dict[str, Inner] = {
    "SGD": Inner(SGD, {"lr": 0.5}),
    "momentum": Inner(SGD, {"lr": 0.3, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.1}),
    "nesterov": Inner(SGD, {"lr": 0.3, "momentum": 0.7, "weight_decay": 0.1}, {"nesterov": True}),
    "Adam": Inner(Adam, ADAM),
    "AdamW": Inner(AdamW, ADAM, {"amsgrad": True}),
    "RMSprop": Inner(
        RMSprop,
        {"lr": 0.02, "alpha": 0.8, "eps": 0.01, "weight_decay": 0.05, "momentum": 0.6},
        {"centered": True},
    ),
    "Adagrad": Inner(
        Adagrad, {"lr": 0.2, "lr_decay": 0.1, "weight_decay": 0.05, "initial_accumulator_value": 0.1, "eps": 0.01}
    ),
    "NAdam": Inner(NAdam, {**ADAM, "momentum_decay": 0.3}),
}


class TinyNet(nn.Module):
    """Two hidden layers, whose weights may be tied, and a head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class Mlp(Problem):
    """Classification with learned example weights, ridge penalty and inner hyperparameters, all outer parameters.

    Args:
        inner: name in ``INNER_OPTIMIZERS``.
        shared: the net's start is learned as well (MAML).
        tied: two layers have one weight.
        learned: whether hyperparameters of the inner optimizer are outer parameters, or numbers.
        options: of :class:`BilevelModule`.
    """

    def __init__(
        self, inner: str = "momentum", shared: bool = False, tied: bool = False, learned: bool = True, **options: Any
    ) -> None:
        super().__init__(**{"inner_steps": 3, "inner_start": "reset", **options})
        self.inner, self.shared, self.learned = INNER_OPTIMIZERS[inner], shared, learned
        with forked(0):
            self.net = TinyNet(tied).double()
        self.example_weights = nn.Parameter(draw(4, seed=1))
        self.log_penalty = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))
        if learned:
            values = torch.tensor(list(self.inner.hyperparameters.values()), dtype=torch.float64)
            self.log_hyperparameters = nn.Parameter(values.log())

    def inner_parameters(self):
        return list(self.net.parameters())

    def outer_parameters(self):
        return [p for name, p in self.named_parameters() if self.shared or not name.startswith("net.")]

    def inner_loss(self, batch):
        x, y, index = batch
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        penalty = sum(parameter.square().sum() for parameter in self.net.parameters())
        return (self.example_weights[index].sigmoid() * losses).mean() + 0.5 * self.log_penalty.exp() * penalty

    def outer_loss(self, batch):
        x, y, index = batch
        return F.cross_entropy(self.net(x), y) + 0.01 * self.example_weights[index].square().sum()

    def configure_inner_optimizer(self):
        values = self.log_hyperparameters.exp() if self.learned else self.inner.hyperparameters.values()
        return self.inner.kind(**self.inner.arguments(values))

    def torch_optimizer(self):
        kind = getattr(torch.optim, self.inner.kind.__name__)
        values = self.log_hyperparameters.exp().tolist() if self.learned else self.inner.hyperparameters.values()
        return kind(self.net.parameters(), **self.inner.arguments(values))


class NoisyMlp(Mlp):
    """With buffers that the inner steps move, and masks that they draw."""

    def __init__(self, inner: str = "SGD", shared: bool = False, **options: Any) -> None:
        super().__init__(inner, shared, **options)
        with forked(5):
            self.net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.3), nn.Linear(3, 2))
        self.net.double()


class InPlace:
    """Any :class:`InnerOptimizer` as a plain one, for :func:`train`."""

    def __init__(self, module: Problem, configure: Callable[[], InnerOptimizer]) -> None:
        self.params, self.configure, self.steps = module.inner_named(), configure, 0
        self.opt_state = configure().init(tree.detach(self.params))

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        grads = {name: parameter.grad for name, parameter in self.params.items()}
        params, self.opt_state = self.configure().update(tree.detach(self.params), grads, self.opt_state, self.steps)
        for name, value in params.items():
            self.params[name].copy_(value)


# --- (d) Episodes ---


def episodes(count: int, seed: int = 0, examples: tuple[int, ...] = (3,), inner_batches: int = 2) -> list[Episode]:
    """Return classification episodes for :class:`Mlp`: batches (x, y, index).

    Args:
        count: how many.
        seed: of the data.
        examples: sizes of the inner batches, one per episode, cycled.
        inner_batches: inner batches of each episode.
    """

    def batch(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        x = draw(size, 2, seed=seed)
        index = torch.randperm(4, generator=generator(seed + 1))[:size]
        return x, (x[:, 0] * x[:, 1] > 0).long(), index

    return [
        Episode(
            [batch(examples[i % len(examples)], 1000 * seed + 100 * i + 10 * j) for j in range(inner_batches)],
            batch(4, 1000 * seed + 100 * i + 90),
        )
        for i in range(count)
    ]
