"""Small bilevel problems whose inner solution, outer loss and hypergradient are known, in float64.

Each is there three times: as a :class:`~lightning_bilevel.BilevelModule`, as a plain
:class:`~lightning_bilevel.problem.BilevelProblem`, and as a loop in plain PyTorch that autograd goes back through. The
loop shares the two losses with the others, and nothing else: steps, derivatives and optimizers are its own. Where there
is a closed form, :meth:`SolvedModule.solution` returns that instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bilevel.problem import Batch, Episode
from lightning_bilevel.testing.solved import MOMENTUM, Solution, SolvedModule, drawn, placed_episode
from lightning_bilevel.tree import Params


class Quadratic(SolvedModule):
    """A learned target: g = ½ θᵀAθ − θᵀ(Bφ + x), f = ½‖Cθ − y‖² + ½ρ‖φ‖²; in closed form for SGD and momentum.

    x and y are the means of an inner and of an outer batch.

    Args:
        inner: see :class:`SolvedModule`.
        lr: likewise.
        options: likewise.

    >>> problem = Quadratic(inner_steps=1000)
    >>> episode = problem.episode()
    >>> torch.allclose(problem.solution(episode).theta["theta"], problem.optimum(episode).theta["theta"])
    True
    """

    THETA, PHI = ("theta",), ("target",)
    A: Tensor
    B: Tensor
    C: Tensor

    def __init__(self, inner: str = "SGD", lr: float = 0.2, **options: Any) -> None:
        super().__init__(inner, lr, **options)
        self.theta, self.target = nn.Parameter(drawn(4, seed=4)), nn.Parameter(drawn(3, seed=5))
        self.constants(A=_positive(4, seed=1), B=drawn(4, 3, seed=2), C=drawn(5, 4, seed=3))
        self.rho = 0.3

    def g(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
        """Return the inner loss."""
        t = theta["theta"]
        return 0.5 * t @ self.A @ t - t @ (self.B @ phi["target"] + batch.mean(0)), buffers

    def f(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> Tensor:
        """Return the outer loss."""
        residual = self.C @ theta["theta"] - batch.mean(0)
        return 0.5 * residual.square().sum() + 0.5 * self.rho * phi["target"].square().sum()

    def episode(self, seed: int = 0, size: int = 4) -> Episode:
        """Return one inner batch of shape ``(size, 4)`` and an outer one of shape ``(4, 5)``."""
        return placed_episode([self.drawn(size, 4, seed=100 + seed)], self.drawn(4, 5, seed=200 + seed), seed)

    def solution(self, episode: Episode, seed: int = 0) -> Solution:
        """Return θ_T, h and ∇h in closed form; see :meth:`SolvedModule.solution`.

        With b = Bφ + x and momentum μ, s = (θ, m) and m ← μm + Aθ − b, θ ← θ − ηm, so that s ← Fs + Gb and
        s_T = F^T s_0 + (I − F)⁻¹ (I − F^T) G b.
        """
        if self.inner not in ("SGD", "momentum"):
            return self.unrolled(episode, seed)
        eye = torch.eye(4).to(self.A)
        mu = MOMENTUM if self.inner == "momentum" else 0.0
        velocity = torch.cat([self.A, mu * eye], dim=1)
        step = torch.cat([torch.cat([eye, 0 * eye], dim=1) - self.lr * velocity, velocity])
        push = torch.cat([self.lr * eye, -eye])
        power = torch.linalg.matrix_power(step, self.inner_steps)
        whole = torch.eye(8).to(self.A)
        by_b = torch.linalg.solve(whole - step, (whole - power) @ push)[:4]
        return self._judged(episode, power[:4, :4] @ self.theta.detach() + by_b @ self._b(episode), by_b)

    def optimum(self, episode: Episode) -> Solution:
        """Return what :meth:`solution` tends to with the number of steps: θ* = A⁻¹ b."""
        by_b = torch.linalg.inv(self.A)
        return self._judged(episode, by_b @ self._b(episode), by_b)

    def _b(self, episode: Episode) -> Tensor:
        return (self.B @ self.target + episode.inner[0].mean(0)).detach()

    def _judged(self, episode: Episode, theta: Tensor, by_b: Tensor) -> Solution:
        """Return f and ∇h at θ, whose derivative by b is ``by_b``."""
        phi, residual = self.target.detach(), self.C @ theta - episode.outer.mean(0)
        value = 0.5 * residual.square().sum() + 0.5 * self.rho * phi.square().sum()
        grad = self.B.T @ by_b.T @ self.C.T @ residual + self.rho * phi
        return Solution({"theta": theta}, value, {"target": grad})


class Initialization(SolvedModule):
    """A learned start (MAML): θ_0 = φ, g = ½ (θ − x)ᵀA(θ − x), f = ½‖Cθ − y‖²; in closed form for SGD.

    θ and φ are the same parameter. x and y are the means of an inner and of an outer batch.

    Args:
        inner: see :class:`SolvedModule`.
        lr: likewise.
        options: likewise; ``proximal`` adds λ/2 ‖θ − φ‖² to g.

    >>> problem = Initialization()
    >>> list(problem.solution(problem.episode()).grads)
    ['theta']
    """

    THETA, PHI = ("theta",), ("theta",)
    A: Tensor
    C: Tensor

    def __init__(self, inner: str = "SGD", lr: float = 0.2, **options: Any) -> None:
        super().__init__(inner, lr, **options)
        self.theta = nn.Parameter(drawn(4, seed=6))
        self.constants(A=_positive(4, seed=7), C=drawn(5, 4, seed=8))

    def g(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
        """Return the inner loss."""
        difference = theta["theta"] - batch.mean(0)
        return 0.5 * difference @ self.A @ difference, buffers

    def f(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> Tensor:
        """Return the outer loss."""
        return 0.5 * (self.C @ theta["theta"] - batch.mean(0)).square().sum()

    def episode(self, seed: int = 0, size: int = 4) -> Episode:
        """Return one inner batch of shape ``(size, 4)`` and an outer one of shape ``(4, 5)``."""
        return placed_episode([self.drawn(size, 4, seed=300 + seed)], self.drawn(4, 5, seed=400 + seed), seed)

    def solution(self, episode: Episode, seed: int = 0) -> Solution:
        """Return θ_T, h and ∇h in closed form; see :meth:`SolvedModule.solution`.

        With H = A + λI, P = (I − ηH)^T and the minimum θ* = H⁻¹(Ax + λφ): θ_T = θ* + P(φ − θ*).
        """
        if self.inner != "SGD":
            return self.unrolled(episode, seed)
        eye, phi = torch.eye(4).to(self.A), self.theta.detach()
        hessian = self.A + self.proximal * eye
        power = torch.linalg.matrix_power(eye - self.lr * hessian, self.inner_steps)
        minimum = torch.linalg.solve(hessian, self.A @ episode.inner[0].mean(0) + self.proximal * phi)
        theta = minimum + power @ (phi - minimum)
        by_phi = power + (eye - power) @ torch.linalg.inv(hessian) * self.proximal
        residual = self.C @ theta - episode.outer.mean(0)
        return Solution({"theta": theta}, 0.5 * residual.square().sum(), {"theta": by_phi.T @ self.C.T @ residual})


class Rates(SolvedModule):
    """A learned inner learning rate, and a target: g = ½ (θ − φ − x)ᵀA(θ − φ − x), f = ½‖θ − y‖².

    Args:
        inner: see :class:`SolvedModule`.
        lr: where the rate starts.
        options: likewise.

    >>> problem = Rates(lr=0.5)
    >>> problem.log_lr.exp()
    tensor(0.5000, dtype=torch.float64, grad_fn=<ExpBackward0>)
    """

    THETA, PHI = ("theta",), ("target", "log_lr")
    A: Tensor

    def __init__(self, inner: str = "SGD", lr: float = 0.2, **options: Any) -> None:
        super().__init__(inner, lr, **options)
        self.theta, self.target = nn.Parameter(drawn(2, seed=9)), nn.Parameter(drawn(2, seed=10))
        self.log_lr = nn.Parameter(torch.tensor(lr, dtype=torch.float64).log())
        self.constants(A=_positive(2, seed=11))

    def g(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
        """Return the inner loss."""
        difference = theta["theta"] - phi["target"] - batch.mean(0)
        return 0.5 * difference @ self.A @ difference, buffers

    def f(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> Tensor:
        """Return the outer loss."""
        return 0.5 * (theta["theta"] - batch.mean(0)).square().sum()

    def episode(self, seed: int = 0, size: int = 4) -> Episode:
        """Return two inner batches of shape ``(size, 2)`` and an outer one of shape ``(4, 2)``."""
        inner = [self.drawn(size, 2, seed=500 + 10 * seed + number) for number in range(2)]
        return placed_episode(inner, self.drawn(4, 2, seed=600 + seed), seed)


class Ridge(SolvedModule):
    """Learned ridge penalties: g = ½ mean (Xw − y)² + ½ Σ e^{φ_i} w_i², f = ½ mean (Xw − y)² on held-out data.

    Args:
        inner: see :class:`SolvedModule`.
        lr: likewise.
        options: likewise.

    >>> problem = Ridge()
    >>> problem.optimum(problem.episode()).theta["weight"].shape
    torch.Size([3])
    """

    THETA, PHI = ("weight",), ("log_penalty",)

    def __init__(self, inner: str = "SGD", lr: float = 0.2, **options: Any) -> None:
        super().__init__(inner, lr, **options)
        self.weight, self.log_penalty = nn.Parameter(drawn(3, seed=12)), nn.Parameter(0.5 * drawn(3, seed=13))

    def g(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
        """Return the inner loss."""
        penalty = 0.5 * (phi["log_penalty"].exp() * theta["weight"].square()).sum()
        return self.f(theta, phi, batch, buffers) + penalty, buffers

    def f(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> Tensor:
        """Return the outer loss."""
        x, y = batch
        return 0.5 * (x @ theta["weight"] - y).square().mean()

    def episode(self, seed: int = 0, size: int = 4) -> Episode:
        """Return one inner batch of ``2 * size`` examples of 3 features, and an outer one of 6."""
        inner, outer = (
            (self.drawn(count, 3, seed=first + seed), self.drawn(count, seed=first + 50 + seed))
            for count, first in ((2 * size, 700), (6, 800))
        )
        return placed_episode([inner], outer, seed)

    def optimum(self, episode: Episode) -> Solution:
        """Return w* = H⁻¹ Xᵀy/n, f there and ∇h, from dw*/dφ_i = −H⁻¹ e_i e^{φ_i} w*_i."""
        (x, y), (outer_x, outer_y) = episode.inner[0], episode.outer
        penalty = self.log_penalty.detach().exp()
        hessian = x.T @ x / len(y) + torch.diag(penalty)
        weight = torch.linalg.solve(hessian, x.T @ y / len(y))
        residual = outer_x @ weight - outer_y
        grad = -torch.linalg.solve(hessian, outer_x.T @ residual / len(outer_y)) * penalty * weight
        return Solution({"weight": weight}, 0.5 * residual.square().mean(), {"log_penalty": grad})

    def minimum(self, phi: Params, batches: Sequence[Batch]) -> Params:
        """Return w* as a function of φ."""
        ((x, y),) = batches
        hessian = x.T @ x / len(y) + torch.diag(phi["log_penalty"].exp())
        return {"weight": torch.linalg.solve(hessian, x.T @ y / len(y))}


class RidgeSolver(Ridge):
    """:class:`Ridge` with a differentiable closed-form solver in place of the inner loop.

    >>> problem = RidgeSolver()
    >>> problem.has_solver, problem.differentiable_solve
    (True, True)
    """

    def solve_inner(self, batches: Sequence[Batch]) -> Params:
        """Return w*."""
        return self.minimum(self.named(self.PHI), batches)

    def solution(self, episode: Episode, seed: int = 0) -> Solution:
        """Return :meth:`Ridge.optimum`."""
        return self.optimum(episode)


class RidgeBlackBox(Ridge):
    """:class:`Ridge` with a solver that autograd sees nothing of.

    >>> problem = RidgeBlackBox()
    >>> problem.has_solver, problem.differentiable_solve
    (True, False)
    """

    differentiable_solve = False

    def solve_inner(self, batches: Sequence[Batch]) -> Params:
        """Return w*, detached from the penalties."""
        with torch.no_grad():
            return self.minimum(self.named(self.PHI), batches)

    def solution(self, episode: Episode, seed: int = 0) -> Solution:
        """Return :meth:`Ridge.optimum`."""
        return self.optimum(episode)


class Several(SolvedModule):
    """Outer parameters of several shapes: example weights (4,), a map of the features (3, 3), a penalty ().

    g = mean_i σ(a_i) ‖tanh(W x_i M + b) − y_i‖² + ½ e^p ‖W‖² and f = mean ‖tanh(W x_i M + b) − y_i‖²; the net is a
    submodule.

    Args:
        inner: see :class:`SolvedModule`.
        lr: likewise.
        options: likewise.

    >>> {name: tuple(value.shape) for name, value in Several().plain().phi.items()}
    {'weights': (4,), 'features': (3, 3), 'log_penalty': ()}
    """

    THETA, PHI = ("net.weight", "net.bias"), ("weights", "features", "log_penalty")

    def __init__(self, inner: str = "SGD", lr: float = 0.2, **options: Any) -> None:
        super().__init__(inner, lr, **options)
        self.net = _linear(3, 2, seed=14)
        self.weights, self.features = nn.Parameter(drawn(4, seed=15)), nn.Parameter(drawn(3, 3, seed=16))
        self.log_penalty = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def g(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
        """Return the inner loss."""
        x, y = batch
        errors = self._errors(theta, phi, x, y) * phi["weights"][: len(y)].sigmoid()
        return errors.mean() + 0.5 * phi["log_penalty"].exp() * theta["net.weight"].square().sum(), buffers

    def f(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> Tensor:
        """Return the outer loss."""
        return self._errors(theta, phi, *batch).mean()

    def episode(self, seed: int = 0, size: int = 4) -> Episode:
        """Return two inner batches of ``size`` examples, at most 4, and an outer one of 5."""
        return _regression(self, seed, size, 900)

    @staticmethod
    def _errors(theta: Params, phi: Params, x: Tensor, y: Tensor) -> Tensor:
        predicted = F.linear(x @ phi["features"], theta["net.weight"], theta["net.bias"]).tanh()
        return (predicted - y).square().sum(1)


class Centred(SolvedModule):
    """Buffers that move, masks that are drawn: features minus the batch's mean, whose running mean f uses.

    g = mean_i σ(a_i) ‖W D(x_i − x̄) + b − y_i‖² with dropout D, f = mean ‖W (x_i − m) + b − y_i‖² + ½ρ‖a‖² with the
    running mean m.

    Args:
        inner: see :class:`SolvedModule`.
        lr: likewise.
        dropout: the rate of D.
        options: likewise.

    >>> problem = Centred(dropout=0.5)
    >>> first, other = (problem.solution(problem.episode(), seed).value for seed in (0, 1))
    >>> bool(first == other)
    False
    """

    THETA, PHI, BUFFERS = ("net.weight", "net.bias"), ("weights",), ("mean",)
    mean: Tensor

    def __init__(self, inner: str = "SGD", lr: float = 0.2, dropout: float = 0.0, **options: Any) -> None:
        super().__init__(inner, lr, **options)
        self.net, self.weights, self.dropout = _linear(3, 2, seed=17), nn.Parameter(drawn(4, seed=18)), dropout
        self.rho = 0.3
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def g(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
        """Return the inner loss, and the running mean after it."""
        x, y = batch
        mean = x.mean(0) if self.training else buffers["mean"]
        errors = self._errors(theta, F.dropout(x - mean, self.dropout, self.training), y)
        after = {"mean": 0.8 * buffers["mean"] + 0.2 * mean} if self.training else buffers
        return (errors * phi["weights"][: len(y)].sigmoid()).mean(), after

    def f(self, theta: Params, phi: Params, batch: Batch, buffers: Params) -> Tensor:
        """Return the outer loss."""
        x, y = batch
        penalty = 0.5 * self.rho * phi["weights"].square().sum()
        return self._errors(theta, x - buffers["mean"], y).mean() + penalty

    def episode(self, seed: int = 0, size: int = 4) -> Episode:
        """Return two inner batches of ``size`` examples, at most 4, and an outer one of 5."""
        return _regression(self, seed, size, 1300)

    @staticmethod
    def _errors(theta: Params, x: Tensor, y: Tensor) -> Tensor:
        return (F.linear(x, theta["net.weight"], theta["net.bias"]) - y).square().sum(1)


PROBLEMS: dict[str, Callable[..., SolvedModule]] = {
    "Quadratic": Quadratic,
    "Quadratic, momentum": lambda **options: Quadratic("momentum", **options),
    "Quadratic, Adam": lambda **options: Quadratic("Adam", **options),
    "Initialization": Initialization,
    "Initialization, momentum": lambda **options: Initialization("momentum", **options),
    "Initialization, proximal": lambda **options: Initialization(**{"proximal": 0.4, **options}),
    "Rates": Rates,
    "Rates, momentum": lambda **options: Rates("momentum", **options),
    "Rates, Adam": lambda **options: Rates("Adam", **options),
    "Ridge": Ridge,
    "RidgeSolver": RidgeSolver,
    "Several": Several,
    "Several, Adam": lambda **options: Several("Adam", **options),
    "Centred": Centred,
    "Centred, dropout": lambda **options: Centred("momentum", dropout=0.3, **options),
}
"""Every problem whose hypergradient is known, by name; each takes options of ``BilevelModule``."""


def _positive(size: int, seed: int) -> Tensor:
    """Return a symmetric matrix with eigenvalues of at least 0.3."""
    root = drawn(size, size, seed=seed)
    return root @ root.T / size + 0.3 * torch.eye(size, dtype=torch.float64)


def _linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
    """Return a layer whose entries are drawn from a generator of its own."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(drawn(outputs, inputs, seed=seed))
        layer.bias.copy_(drawn(outputs, seed=seed + 1000))
    return layer


def _regression(module: SolvedModule, seed: int, size: int, first: int) -> Episode:
    """Return two inner batches (x, y) of ``size`` examples, and an outer one of 5."""
    batches = [
        (
            module.drawn(count, 3, seed=first + 10 * seed + number),
            module.drawn(count, 2, seed=first + 200 + 10 * seed + number),
        )
        for number, count in enumerate((size, size, 5))
    ]
    return placed_episode(batches[:2], batches[2], seed)
