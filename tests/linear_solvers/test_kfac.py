"""KFAC: exact where Kronecker factors are, against Hessians that share no code with it; saves products elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, Episode, ImplicitGradient, hypergradient, tree
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import KFAC, ConjugateGradient, Dense, Identity, LinearSystem
from lightning_bilevel.tree import Params
from tests.support.problems import assert_close, draw

DAMPING = 0.05
Loss = Callable[[Params], Tensor]


def of(module: nn.Module, loss: Callable[[nn.Module], Tensor]) -> tuple[Loss, Params]:
    """Return a loss as a function of a module's parameters, and these."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data = 0.5 * draw(*parameter.shape, seed=number)
    return lambda theta: torch.func.functional_call(_Call(module, loss), _prefixed(theta), ()), {
        name: parameter.detach() for name, parameter in module.named_parameters()
    }


class _Call(nn.Module):
    def __init__(self, module: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self) -> Tensor:
        return self.loss(self.module)


def _prefixed(theta: Params) -> Params:
    return {f"module.{name}": value for name, value in theta.items()}


def exact(loss: Loss, theta: Params, v: Params, *together: str) -> Params:
    """Return (H + λI)⁻¹ v for the block of the Hessian that belongs to some parameters, by torch.func."""
    part = {name: theta[name] for name in together}
    block = torch.func.hessian(lambda own: loss({**theta, **own}))(part)
    rows = [torch.cat([block[a][b].reshape(part[a].numel(), -1) for b in together], 1) for a in together]
    matrix = torch.cat(rows)
    x = torch.linalg.solve(
        matrix + DAMPING * torch.eye(len(matrix)).double(), tree.flatten({n: v[n] for n in together})
    )
    return tree.unflatten(x, part)


def like(theta: Params) -> Params:
    return {name: draw(*value.shape, seed=50 + number) for number, (name, value) in enumerate(theta.items())}


WEIGHTS = draw(7, seed=20).abs()
X, Y, LABELS = draw(7, 3, seed=21), draw(7, 2, seed=22), torch.tensor([0, 1, 1, 0, 1, 0, 0])
LINEAR: dict[str, Callable[[nn.Module], Tensor]] = {
    "mean squared error": lambda net: F.mse_loss(net(X), Y),
    "sum": lambda net: F.mse_loss(net(X), Y, reduction="sum"),
    "weighted examples": lambda net: (WEIGHTS * (net(X) - Y).square().sum(1)).mean(),
    "coupled outputs": lambda net: ((net(X) - Y) @ torch.tensor([[2.0, 1.0], [0.0, 1.0]]).double()).square().sum(),
    "sequence": lambda net: F.mse_loss(net(X.reshape(1, 7, 3)), Y.reshape(1, 7, 2)),
    "called twice": lambda net: (
        F.mse_loss(net(X[:4]), Y[:4], reduction="sum") + F.mse_loss(net(X[4:]), Y[4:], reduction="sum")
    ),
    "cross entropy of one": lambda net: F.cross_entropy(net(X[:1]), LABELS[:1]),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("error", LINEAR.values(), ids=LINEAR)
def test_is_exact_for_a_linear_layer(error: Callable[[nn.Module], Tensor], bias: bool) -> None:
    loss, theta = of(nn.Linear(3, 2, bias=bias).double(), error)
    v = like(theta)
    inverse = KFAC(damping=DAMPING).make_preconditioner(loss, theta)
    assert_close(inverse(v), exact(loss, theta, v, *theta), 1e-9)


def test_is_exact_within_each_layer_for_one_example() -> None:
    """Rectified linear units have no curvature: a block of the Gauss–Newton matrix is that of the Hessian."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    loss, theta = of(net, lambda net: F.cross_entropy(net(X[:1]), LABELS[:1]))
    v, inverse = like(theta), KFAC(damping=DAMPING).make_preconditioner(loss, theta)
    for layer in ("0", "2", "4"):
        names = f"{layer}.weight", f"{layer}.bias"
        assert_close({name: inverse(v)[name] for name in names}, exact(loss, theta, v, *names), 1e-9)


def test_is_exact_for_a_convolution_with_one_place() -> None:
    image = draw(1, 2, 3, 3, seed=30)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()).double()
    loss, theta = of(net, lambda net: F.cross_entropy(net(image), LABELS[:1]))
    v = like(theta)
    assert_close(KFAC(damping=DAMPING).make_preconditioner(loss, theta)(v), exact(loss, theta, v, *theta), 1e-9)


GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"padding": 1},
    {"stride": 2},
    {"dilation": 2},
    {"padding": 1, "padding_mode": "circular"},
]


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_is_exact_for_the_squared_error_of_a_convolution(options: dict[str, Any]) -> None:
    """Its outputs are the loss's own: every place is a row with the same curvature."""
    images = draw(2, 2, 5, 5, seed=31)
    loss, theta = of(nn.Conv2d(2, 3, 2, **options).double(), lambda net: net(images).square().mean())
    v = like(theta)
    assert_close(KFAC(damping=DAMPING).make_preconditioner(loss, theta)(v), exact(loss, theta, v, *theta), 1e-9)


def test_two_heads_add_their_curvature_in_the_trunk() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.trunk(x).relu()
            return self.a(h), self.b(h)

    def error(net: nn.Module) -> Tensor:
        a, b = net(X[:1])
        return F.mse_loss(a, Y[:1]) + 3 * F.cross_entropy(b, LABELS[:1])

    loss, theta = of(Heads().double(), error)
    v, inverse = like(theta), KFAC(damping=DAMPING).make_preconditioner(loss, theta)
    for layer in ("trunk", "a", "b"):
        names = f"{layer}.weight", f"{layer}.bias"
        assert_close({name: inverse(v)[name] for name in names}, exact(loss, theta, v, *names), 1e-9)


def test_what_is_in_no_such_layer_is_divided_by_the_damping() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).double()
    loss, theta = of(net, lambda net: F.mse_loss(net(X), Y))
    v = like(theta)
    found = KFAC(damping=DAMPING).make_preconditioner(loss, theta)(v)
    assert_close({"1.weight": found["1.weight"]}, {"1.weight": v["1.weight"] / DAMPING})
    flat, nothing = of(nn.Linear(3, 2).double(), lambda net: net(X).sum())
    v = like(nothing)
    assert_close(KFAC(damping=DAMPING).make_preconditioner(flat, nothing)(v), tree.scale(v, 1 / DAMPING))


def test_samples_tend_to_all_columns() -> None:
    net, labels = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).double(), torch.arange(7) % 4
    loss, theta = of(net, lambda net: F.cross_entropy(net(X), labels))
    v = like(theta)
    whole = KFAC(damping=DAMPING).make_preconditioner(loss, theta)(v)
    few, many = (
        tree.norm(tree.sub(KFAC(DAMPING, samples=count).make_preconditioner(loss, theta)(v), whole)) / tree.norm(whole)
        for count in (1, 1000)
    )
    assert many < 0.05 < few
    again = [KFAC(DAMPING, samples=1, seed=seed).make_preconditioner(loss, theta)(v) for seed in (0, 0, 1)]
    assert_close(again[0], again[1], 0)
    assert tree.norm(tree.sub(again[0], again[2])) > 0


class Classifier(BilevelModule):
    """A net whose inner loss has one learned weight for every example."""

    def __init__(self) -> None:
        super().__init__(inner_steps=60, inner_start="reset")
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.p = nn.Parameter(draw(20, seed=40))

    def inner_parameters(self) -> nn.Module:
        return self.net

    def inner_loss(self, batch: Any) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        decay = sum(p.square().sum() for p in self.net.parameters())
        return (self.p.sigmoid() * loss).mean() + 5e-3 * decay

    def outer_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_inner_optimizer(self) -> SGD:
        return SGD(lr=0.5, momentum=0.9)


def episode() -> Episode:
    x, a = draw(20, 6, seed=41) * torch.logspace(-1, 0.5, 6).double(), draw(20, 6, seed=42)
    return Episode([(x, x[:, :3].argmax(1))], (a, a[:, :3].argmax(1)))


@pytest.mark.filterwarnings("ignore:`ConjugateGradient")
def test_conjugate_gradients_come_further_with_it() -> None:
    exactly = hypergradient(Classifier(), ImplicitGradient(Dense()), episode()).grads["p"]

    def off(**options: Any) -> float:
        found = hypergradient(Classifier(), ImplicitGradient(ConjugateGradient(max_iter=6, **options)), episode())
        return float((found.grads["p"] - exactly).norm() / exactly.norm())

    assert off(preconditioner=KFAC(damping=1e-2)) < 0.5 * off()


def test_as_a_solver_it_is_nearer_than_the_identity() -> None:
    exactly = hypergradient(Classifier(), ImplicitGradient(Dense()), episode()).grads["p"]
    near, far = (
        F.cosine_similarity(hypergradient(Classifier(), ImplicitGradient(solver), episode()).grads["p"], exactly, dim=0)
        for solver in (KFAC(damping=1e-2), Identity())
    )
    assert near > far + 0.1


def test_refusals() -> None:
    system = LinearSystem(lambda v: v, {"w": torch.ones(1)})
    with pytest.raises(MisconfigurationError, match="Cannot use `KFAC` with a linear system that has no precond"):
        KFAC().solve(system)
    with pytest.raises(MisconfigurationError, match="Cannot use `KFAC` with a linear system that is not symmetric"):
        ImplicitGradient(KFAC(), form="fixed_point")


def test_functions_are_put_back() -> None:
    before = F.linear, F.conv2d

    def broken(theta: Params) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        KFAC().make_preconditioner(broken, {"w": torch.ones(1)})
    assert (F.linear, F.conv2d) == before
