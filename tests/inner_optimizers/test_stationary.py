"""What an inner optimizer says its fixed points are, against where long runs of it end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_bilevel import SGD, Adagrad, Adam, AdamW, RMSprop, tree
from lightning_bilevel.inner_optimizers import InnerOptimizer, from_torch
from lightning_bilevel.inner_optimizers.elementwise import ElementwiseOptimizer
from lightning_bilevel.tree import Params
from tests.support.problems import assert_close, draw

SHAPES = {"0.weight": (2, 3), "0.bias": (3,)}
TARGET = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
CURVATURE = {name: 0.5 + draw(*shape, seed=10 + i).sigmoid() for i, (name, shape) in enumerate(SHAPES.items())}

DECAYS: dict[str, Any] = {
    "none": 0,
    "number": 0.3,
    "tensor": torch.tensor(0.3, dtype=torch.float64),
    "shaped": {"*.bias": torch.full((3,), 0.2, dtype=torch.float64), "*": torch.full((2, 3), 0.4, dtype=torch.float64)},
    "per parameter": {"*.bias": 0, "*": 0.3},
}
KINDS: dict[str, tuple[type[ElementwiseOptimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.3}),
    "momentum": (SGD, {"lr": 0.3, "momentum": 0.5, "dampening": 0.2}),
    "nesterov": (SGD, {"lr": 0.3, "momentum": 0.5, "nesterov": True}),
    # With a large eps steps are those of descent in the end, and do not circle the fixed point at the learning rate.
    "Adam": (Adam, {"lr": 0.3, "betas": (0.5, 0.9), "eps": 1.0}),
    "amsgrad": (Adam, {"lr": 0.3, "betas": (0.5, 0.9), "eps": 1.0, "amsgrad": True}),
    "RMSprop": (RMSprop, {"lr": 0.3, "alpha": 0.9, "eps": 1.0}),
    "centered": (RMSprop, {"lr": 0.3, "alpha": 0.9, "eps": 1.0, "momentum": 0.3, "centered": True}),
    "Adagrad": (Adagrad, {"lr": 0.5, "eps": 1.0}),
    "AdamW": (AdamW, {"lr": 0.3, "betas": (0.5, 0.9), "eps": 1.0}),
}


def gradient(theta: Params, sign: float) -> Params:
    """Return the gradient of ± ½ Σ a (θ − b)²."""
    return {name: sign * CURVATURE[name] * (value - TARGET[name]) for name, value in theta.items()}


def fixed_point(optimizer: InnerOptimizer, sign: float, steps: int = 600) -> Params:
    theta = {name: draw(*shape, seed=20) for name, shape in SHAPES.items()}
    opt_state = optimizer.init(theta)
    for step in range(1, steps + 1):
        theta, opt_state = optimizer.update(theta, gradient(theta, sign), opt_state, step)
    after, _ = optimizer.update(theta, gradient(theta, sign), opt_state, steps + 1)
    assert_close(after, theta, 1e-12)
    return theta


def slope(optimizer: InnerOptimizer, theta: Params, sign: float) -> Params:
    """Return the gradient of ±g + penalty."""
    leaves = tree.leaves(theta)
    penalty = optimizer.penalty(leaves)
    decay = tree.grad(penalty, leaves) if isinstance(penalty, torch.Tensor) else tree.zeros_like(theta)
    return tree.add(decay, gradient(theta, sign), alpha=-1.0 if optimizer.maximize else 1.0)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize(("kind", "options"), KINDS.values(), ids=KINDS)
def test_a_long_run_ends_where_it_says(
    kind: type[ElementwiseOptimizer], options: dict[str, Any], decay: Any, maximize: bool
) -> None:
    sign = -1.0 if maximize else 1.0
    optimizer = kind(**options, weight_decay=decay, maximize=maximize)
    theta = fixed_point(optimizer, sign)
    found = slope(optimizer, theta, sign)
    zero = tree.zeros_like(theta)
    assert optimizer.stationary is (kind is not AdamW or decay is DECAYS["none"])
    if optimizer.stationary:
        assert_close(found, zero, 1e-5)  # the absolute part of it: 1e-9
    else:
        with pytest.raises(AssertionError):
            assert_close(found, zero, 1e-2)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("kind", "options"), KINDS.values(), ids=KINDS)
def test_converted_optimizers_say_the_same(
    kind: type[ElementwiseOptimizer], options: dict[str, Any], maximize: bool
) -> None:
    theta = {name: torch.nn.Parameter(draw(*shape, seed=20)) for name, shape in SHAPES.items()}
    weight, bias = theta.values()
    groups = [{"params": [weight], "weight_decay": 0.4}, {"params": [bias]}]
    plain = getattr(torch.optim, kind.__name__)
    converted = from_torch(plain(groups, **options, weight_decay=0.0, maximize=maximize), theta)
    ours = kind(**options, weight_decay={"*.weight": 0.4, "*": 0.0}, maximize=maximize)
    assert (converted.stationary, converted.maximize) == (kind is not AdamW, maximize)
    assert (ours.stationary, ours.maximize) == (kind is not AdamW, maximize)
    expected = 0.2 * weight.detach().square().sum().item() if kind is not AdamW else 0.0
    values = {name: value.detach() for name, value in theta.items()}
    for optimizer in (converted, ours):
        assert float(optimizer.penalty(values)) == pytest.approx(expected, rel=1e-14)


def test_the_flag_of_torch_for_decoupled_decay_is_seen() -> None:
    if torch.__version__ < "2.7":
        pytest.skip("`decoupled_weight_decay` is newer")
    theta = {"w": torch.nn.Parameter(torch.ones(1))}
    optimizer = torch.optim.Adam(theta.values(), weight_decay=0.1, decoupled_weight_decay=True)
    assert from_torch(optimizer, theta).stationary is False


@pytest.mark.parametrize("decay", [0, 0.0, {"*": 0}, {"a": 0, "*": 0.0}], ids=str)
def test_adamw_without_decay_is_adam(decay: Any) -> None:
    optimizer = AdamW(weight_decay=decay)
    assert optimizer.stationary is True
    assert float(optimizer.penalty({"a": torch.ones(2), "b": torch.ones(2)})) == 0


@pytest.mark.parametrize("decay", [0.01, torch.tensor(0.0), {"a": 0, "*": 0.1}], ids=str)
def test_adamw_with_decay_has_no_function(decay: Any) -> None:
    assert AdamW(weight_decay=decay).stationary is False


def test_who_says_nothing_has_no_penalty() -> None:
    class Own(InnerOptimizer):
        def update(self, params, grads, opt_state, step):
            return params, opt_state

    class Ours(ElementwiseOptimizer):
        def __init__(self) -> None:
            super().__init__(False, {"weight_decay": 0.1})

        def initial(self, values):
            return {}

        def rule(self, values, step):
            return lambda param, grad, state: (param, state)

    for optimizer in (Own(), Ours()):
        assert (optimizer.stationary, optimizer.maximize, optimizer.penalty({"w": torch.ones(1)})) == (None, False, 0.0)


def test_a_complex_entry_is_two_real_ones() -> None:
    z = {"z": torch.tensor([3 + 4j], dtype=torch.complex128, requires_grad=True)}
    penalty = SGD(0.1, weight_decay=0.5).penalty(z)
    assert penalty.item() == 0.25 * 25
    assert_close(tree.grad(penalty, z), {"z": 0.5 * z["z"].detach()})


def test_only_the_decay_is_held_constant() -> None:
    lr, decay = (torch.tensor(0.1, requires_grad=True) for _ in range(2))
    optimizer = SGD(lr, weight_decay={"*": decay})
    fixed = optimizer.with_constant_decay()
    theta, _ = fixed.update({"w": torch.ones(1)}, {"w": torch.ones(1)}, {}, 1)
    by_lr, by_decay = torch.autograd.grad(theta["w"], (lr, decay), allow_unused=True)
    assert (by_lr.item(), by_decay) == (pytest.approx(-1.1), None)
    assert optimizer.hyperparameters["weight_decay"]["*"] is decay
    assert optimizer.rates() == [lr]
