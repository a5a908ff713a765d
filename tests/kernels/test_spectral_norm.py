"""Spectral norm: its vectors depend on the weight, in every derivative but the gradient that an optimizer sees.

The oracle is PyTorch's own module in a loop of PyTorch's own optimizer, and its central differences.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations

from lightning_bilevel import (
    SGD,
    BilevelModule,
    Episode,
    ForwardGradient,
    ForwardUnroll,
    HypergradientStrategy,
    ReverseUnroll,
    hypergradient,
)
from lightning_bilevel.directions import Orthogonal
from lightning_bilevel.kernels.inner_gradient import inner_gradient, is_no_derivative
from lightning_bilevel.kernels.safe import differentiable_kernels
from lightning_bilevel.tree import Params
from tests.support.problems import draw
from tests.support.seeds import forked

STEP = 1e-5
CONVERGED = 60


def old_style(layer: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.nn.utils.spectral_norm` is deprecated", FutureWarning)
        return nn.utils.spectral_norm(layer, **options)


class Layer(NamedTuple):
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: dict[str, Any] = {}  # noqa: RUF012


STYLES = {"parametrization": parametrizations.spectral_norm, "old": old_style}
LAYERS = {
    "Linear": Layer(lambda: nn.Linear(3, 4), (3,)),
    "Linear, dim 1": Layer(lambda: nn.Linear(3, 4), (3,), {"dim": 1}),
    "Conv1d": Layer(lambda: nn.Conv1d(2, 3, 2), (2, 4)),
    "Conv2d": Layer(lambda: nn.Conv2d(2, 3, 2), (2, 3, 3)),
    "ConvTranspose2d": Layer(lambda: nn.ConvTranspose2d(2, 3, 2), (2, 2, 2)),
    "Linear, eps": Layer(lambda: nn.Linear(3, 4), (3,), {"eps": 0.1}),
}


def every_layer(test: Any) -> Any:
    return pytest.mark.parametrize("style", STYLES)(pytest.mark.parametrize("kind", LAYERS)(test))


def net(style: str, kind: str, iterations: int, training: bool = True) -> nn.Module:
    layer = LAYERS[kind]
    with forked(0):
        normed = STYLES[style](layer.build().double(), n_power_iterations=iterations, **layer.options)
        size = normed(torch.zeros(1, *layer.shape, dtype=torch.float64)).numel()
        return nn.Sequential(normed, nn.Tanh(), nn.Flatten(), nn.Linear(size, 1).double()).train(training)


def data(kind: str) -> Tensor:
    return draw(5, *LAYERS[kind].shape, seed=1)


def tensors(module: nn.Module) -> tuple[Params, Params]:
    parameters = {name: value.detach().clone() for name, value in module.named_parameters()}
    return parameters, {name: value.clone() for name, value in module.named_buffers()}


def loss_of(module: nn.Module, x: Tensor, parameters: Params, buffers: Params) -> Tensor:
    """Return a loss; ``buffers`` are as before afterwards."""
    own = {name: value.clone() for name, value in buffers.items()}
    return functional_call(module, {**parameters, **own}, (x,)).exp().mean()


def gradient(loss: Callable[[Params], Tensor], parameters: Params, create_graph: bool = False) -> tuple[Params, Params]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    value = loss(leaves)
    with inner_gradient():
        grads = torch.autograd.grad(value, list(leaves.values()), create_graph=create_graph)
    return leaves, dict(zip(leaves, grads, strict=True))


def moved(a: Params, v: Params, by: float) -> Params:
    return {name: value + by * v[name] for name, value in a.items()}


def dot(a: Params, b: Params) -> Tensor:
    return sum((value * b[name]).sum() for name, value in a.items())


# --- One evaluation ---


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("training", [True, False])
@every_layer
def test_values_gradients_and_vectors_are_pytorchs_to_the_bit(
    style: str, kind: str, training: bool, iterations: int
) -> None:
    found = []
    for ours in (False, True):
        module = net(style, kind, iterations, training)
        loss = module(data(kind)).square().mean()
        if ours:
            module = net(style, kind, iterations, training)
            with differentiable_kernels(module):
                loss = module(data(kind)).square().mean()
                with inner_gradient():
                    grads = torch.autograd.grad(loss, list(module.parameters()))
        else:
            grads = torch.autograd.grad(loss, list(module.parameters()))
        found.append([loss, *grads, *module.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("training", [True, False])
@every_layer
def test_derivatives_of_the_gradient_that_the_optimizer_sees(
    style: str, kind: str, training: bool, iterations: int
) -> None:
    """Both v ↦ D∇g v and v ↦ v D∇g, where the iteration has not converged and the two differ."""
    module, x = net(style, kind, iterations, training), data(kind)
    parameters, buffers = tensors(module)
    v, w = ({name: draw(*value.shape, seed=seed) for name, value in parameters.items()} for seed in (2, 3))

    def loss(at: Params) -> Tensor:
        return loss_of(module, x, at, buffers)

    ends = [gradient(loss, moved(parameters, v, sign * STEP))[1] for sign in (1, -1)]
    expected = (dot(ends[0], w) - dot(ends[1], w)).item() / (2 * STEP)

    def seen(at: Params) -> Params:
        with inner_gradient():
            return grad(loss)(at)

    with differentiable_kernels(module):
        leaves, grads = gradient(loss, parameters, create_graph=True)
        back = torch.autograd.grad(dot(grads, w), list(leaves.values()), allow_unused=True)
        pulled = {name: g for name, g in zip(leaves, back, strict=True) if g is not None}
        along = {name: torch.stack([value, -value]) for name, value in v.items()}
        pushed = vmap(lambda v: jvp(seen, (parameters,), (v,))[1])(along)
        assert is_no_derivative(loss(leaves)) == training
    assert dot(pulled, v).item() == pytest.approx(expected, rel=1e-6)
    assert dot({name: rows[0] for name, rows in pushed.items()}, w).item() == pytest.approx(expected, rel=1e-6)


@every_layer
def test_the_outer_derivative_is_that_of_the_value(style: str, kind: str) -> None:
    module, x = net(style, kind, 1), data(kind)
    parameters, buffers = tensors(module)
    v = {name: draw(*value.shape, seed=2) for name, value in parameters.items()}
    ends = [loss_of(module, x, moved(parameters, v, sign * STEP), buffers).item() for sign in (1, -1)]
    leaves = {name: value.requires_grad_() for name, value in parameters.items()}
    with differentiable_kernels(module):
        grads = torch.autograd.grad(loss_of(module, x, leaves, buffers), list(leaves.values()))
    assert dot(dict(zip(leaves, grads, strict=True)), v).item() == pytest.approx(
        (ends[0] - ends[1]) / (2 * STEP), rel=1e-6
    )


@pytest.mark.parametrize("style", STYLES)
def test_episodes_that_are_stacked_have_their_own_vectors(style: str) -> None:
    module, x = net(style, "Linear", 2), data("Linear")
    parameters, buffers = tensors(module)
    several = {name: torch.stack([value, 2 * value + 0.1]) for name, value in parameters.items()}
    vectors = {name: torch.stack([value, value.flip(0)]) for name, value in buffers.items()}
    v = {name: draw(*value.shape, seed=2) for name, value in several.items()}

    def stacked(at: Params) -> Tensor:
        return vmap(lambda at, own: loss_of(module, x, at, own))(at, vectors).sum()

    def looped(at: Params) -> Tensor:
        one = ({name: value[i] for name, value in at.items()} for i in range(2))
        own = ({name: value[i] for name, value in vectors.items()} for i in range(2))
        return sum(loss_of(module, x, at, vectors) for at, vectors in zip(one, own, strict=True))

    with differentiable_kernels(module):
        found = []
        for loss in (stacked, looped):
            leaves, grads = gradient(loss, several, create_graph=True)
            back = torch.autograd.grad(dot(grads, v), list(leaves.values()))
            found.append([*grads.values(), *back])
    torch.testing.assert_close(*found)


def test_complex_weights_and_vectors_are_left_to_pytorch() -> None:
    vector = parametrizations.spectral_norm(nn.Linear(3, 2).double(), name="bias")
    number = parametrizations.spectral_norm(nn.Linear(3, 2, dtype=torch.complex128))
    for module in (vector, number):
        x = torch.ones(3, dtype=module.weight.dtype)
        state = {name: value.clone() for name, value in module.state_dict().items()}
        native = module(x)
        module.load_state_dict(state)
        with differentiable_kernels(module):
            assert torch.equal(module(x), native)


# --- Whole runs ---


def trained(module: nn.Module, x: Tensor, p: float, rate: float = 0.3) -> float:
    """Return the outer loss after three steps in plain PyTorch."""
    optimizer = torch.optim.SGD(module.parameters(), rate)
    for _ in range(3):
        optimizer.zero_grad()
        (module(x).square().mean() * torch.tensor(p, dtype=torch.float64).exp()).backward()
        optimizer.step()
    return (module(x) - 1).square().mean().item()


class Normed(BilevelModule):
    """The outer parameter scales the inner loss."""

    def __init__(self, style: str, kind: str, iterations: int = CONVERGED) -> None:
        super().__init__(inner_steps=3, inner_start="reset")
        self.net = net(style, kind, iterations)
        self.p = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def inner_parameters(self):
        return list(self.net.parameters())

    def inner_loss(self, batch):
        return self.net(batch).square().mean() * self.p.exp()

    def outer_loss(self, batch):
        return (self.net(batch) - 1).square().mean()

    def configure_inner_optimizer(self):
        return SGD(lr=0.3)


STRATEGIES: list[HypergradientStrategy] = [
    ReverseUnroll(),
    ReverseUnroll(checkpoint=1),
    ForwardUnroll(),
    ForwardUnroll(mode="forward"),
    ForwardGradient(1, directions=Orthogonal()),
]


@every_layer
def test_exact_strategies_agree_with_differences_of_a_plain_loop(style: str, kind: str) -> None:
    x = data(kind)
    values = [trained(net(style, kind, CONVERGED), x, sign * STEP) for sign in (1, -1)]
    expected = (values[0] - values[1]) / (2 * STEP)
    for strategy in STRATEGIES:
        result = hypergradient(Normed(style, kind), strategy, Episode([x], x))
        assert result.grads["p"].item() == pytest.approx(expected, rel=1e-5), strategy
        assert result.value.item() == pytest.approx(trained(net(style, kind, CONVERGED), x, 0.0), rel=1e-12)


@pytest.mark.parametrize("iterations", [1, 2])
@every_layer
def test_a_run_goes_where_a_plain_loop_goes(style: str, kind: str, iterations: int) -> None:
    """Also where the iteration has not converged; the engines then agree, but for u and v of the step before."""
    x = data(kind)
    expected = trained(net(style, kind, iterations), x, 0.0)
    reverse = hypergradient(Normed(style, kind, iterations), ReverseUnroll(), Episode([x], x))
    for strategy in STRATEGIES:
        result = hypergradient(Normed(style, kind, iterations), strategy, Episode([x], x))
        assert result.value.item() == pytest.approx(expected, rel=1e-12)
        assert result.grads["p"].item() == pytest.approx(reverse.grads["p"].item(), rel=1e-9), strategy


def test_pytorchs_own_leaves_a_part_out() -> None:
    """What the tests above have to catch: the norm has converged, its first derivative is right."""
    module, x = net("parametrization", "Linear", CONVERGED), data("Linear")
    parameters, buffers = tensors(module)

    def row() -> Tensor:
        leaves, grads = gradient(lambda at: loss_of(module, x, at, buffers), parameters, create_graph=True)
        total = sum(value.sum() for value in grads.values())
        return torch.autograd.grad(total, leaves["0.parametrizations.weight.original"])[0]

    native = row()
    with differentiable_kernels(module):
        ours = row()
    assert (native - ours).abs().max() > 0.01 * ours.abs().max()
