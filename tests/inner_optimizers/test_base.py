"""Inner optimizers: torch.optim's values, right derivatives of every order and mode, hyperparameters of every form."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev

from lightning_bilevel import tree
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.inner_optimizers import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Lion, NAdam, RAdam, RMSprop
from tests.support.optimizers import BOTH, TORCH, generic, run, run_torch, start, transform


def grid(kind, **options):
    """All combinations of options, without those that torch.optim refuses too."""
    for values in product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        if not chosen.get("nesterov") or (chosen["momentum"] and not chosen["dampening"]):
            text = ",".join(f"{key}={value}" for key, value in chosen.items())
            yield pytest.param(kind, chosen, id=f"{kind.__name__}-{text}")


ADAM = {"betas": ((0.9, 0.999), (0.0, 0.8)), "eps": (1e-8, 1e-2), "weight_decay": (0, 0.1)}
ADAM |= {"amsgrad": BOTH, "maximize": BOTH}
EVERY_OPTION = [
    *grid(SGD, momentum=(0, 0.9), dampening=(0, 0.3), weight_decay=(0, 0.1), nesterov=BOTH, maximize=BOTH),
    *grid(Adam, **ADAM),
    *grid(AdamW, **ADAM),
    *grid(RMSprop, alpha=(0.99, 0.5), eps=(1e-8, 1e-2), weight_decay=(0, 0.1), momentum=(0, 0.9), centered=BOTH,
          maximize=BOTH),
    *grid(Adagrad, lr_decay=(0, 0.2), weight_decay=(0, 0.1), initial_accumulator_value=(0, 0.3), eps=(1e-10, 1e-2),
          maximize=BOTH),
    *grid(NAdam, betas=((0.9, 0.999), (0.0, 0.8)), eps=(1e-8, 1e-2), weight_decay=(0, 0.1), momentum_decay=(4e-3, 0.5),
          decoupled_weight_decay=BOTH, maximize=BOTH),
    *grid(RAdam, betas=((0.9, 0.999), (0.0, 0.8)), eps=(1e-8, 1e-2), weight_decay=(0, 0.1),
          decoupled_weight_decay=BOTH, maximize=BOTH),
    *grid(Adamax, betas=((0.9, 0.999), (0.0, 0.8)), eps=(1e-8, 1e-2), weight_decay=(0, 0.1), maximize=BOTH),
    *grid(Adadelta, rho=(0.9, 0.3), eps=(1e-6, 1e-2), weight_decay=(0, 0.1), maximize=BOTH),
]  # fmt: skip
ADAPTIVE = [
    *((kind, {"amsgrad": amsgrad}) for kind in (Adam, AdamW) for amsgrad in BOTH),
    *((RMSprop, {"centered": centered, "momentum": momentum}) for centered in BOTH for momentum in (0, 0.9)),
    *((kind, {"decoupled_weight_decay": apart}) for kind in (NAdam, RAdam) for apart in BOTH),
    (Adamax, {}),
    (Adagrad, {}),
]


@pytest.mark.parametrize(("kind", "options"), EVERY_OPTION)
def test_values_are_those_of_torch_optim(kind, options):
    leaves = tree.leaves(tree.map(torch.clone, start()))
    expected = run_torch(TORCH[kind](leaves.values(), lr=0.05, **options), leaves)
    torch.testing.assert_close(run(kind(lr=0.05, **options), start()), expected, rtol=1e-12, atol=1e-14)


def from_start_and_hyperparameters(kind, options, steps):
    """Return the map from one vector of θ_0 and all hyperparameters to θ_T, and a point where it has no kinks."""
    theta = start()["net.0.bias"]
    point = theta.tolist()
    positions = transform(options, lambda value: point.append(value) or len(point) - 1)

    def solve(z):
        optimizer = kind(**transform(positions, lambda position: z[position]))
        return run(optimizer, {"net.0.bias": z[: len(theta)]}, steps)["net.0.bias"]

    return solve, torch.tensor(point, dtype=torch.float64, requires_grad=True)


@generic
def test_derivatives_are_those_of_finite_differences(kind, options):
    """Reverse, forward and vectorized forward, of θ_0 and of every hyperparameter."""
    solve, point = from_start_and_hyperparameters(kind, options, steps=5)
    assert gradcheck(solve, point, check_forward_ad=True, check_batched_forward_grad=True)


@generic
def test_second_derivatives_are_those_of_finite_differences(kind, options):
    """Double backward and forward over reverse."""
    solve, point = from_start_and_hyperparameters(kind, options, steps=2)
    assert gradgradcheck(solve, point, check_fwd_over_rev=True)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("kind", "options"), ADAPTIVE, ids=lambda value: getattr(value, "__name__", str(value)))
def test_derivatives_at_zero_gradients_are_finite(kind, options, steps):
    """Of first and second order, in reverse and forward mode, which agree; the entries are 0 once, always and never."""
    masks = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)

    def solve(z):
        theta, signal, hyper = z[:3], z[3:6], z[6:]
        optimizer = kind(lr=hyper[0], eps=1e-8 * hyper[1], weight_decay=hyper[2] - 1, **options)

        def masked(params, step):
            return {"w": signal * masks[step - 1] + params["w"] * masks[step - 1]}

        return run(optimizer, {"w": theta}, steps, masked)["w"]

    z = torch.tensor([0.0, 0.0, 0.5, 0.1, 0.0, 0.3, 0.1, 1.0, 1.0], dtype=torch.float64)
    first, forward = jacrev(solve)(z), jacfwd(solve)(z)
    second, mixed = jacrev(jacrev(solve))(z), jacfwd(jacrev(solve))(z)
    assert all(torch.isfinite(value).all() for value in (first, forward, second, mixed))
    torch.testing.assert_close(forward, first)
    torch.testing.assert_close(mixed, second)


@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop, Adagrad])
def test_derivative_at_a_zero_gradient_is_the_true_one(kind):
    """θ_1 = θ_0 − lr · c g / (c |g| + eps) near g = 0, with c = 1 but for RMSprop, where the numerator has no c."""
    theta = {"w": torch.ones(1, dtype=torch.float64)}
    optimizer = kind(lr=0.1, eps=1e-3, weight_decay=0)
    grad = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    new, _ = optimizer.update(theta, {"w": grad}, optimizer.init(theta), 1)
    (derivative,) = torch.autograd.grad(new["w"], grad)
    assert derivative.item() == pytest.approx(-0.1 / 1e-3)
    assert new["w"].item() == 1.0


def masked_run(kind, options, steps):
    """Return the map from θ_0 and a signal to θ_T; the entries of the gradient are 0 once, always and never."""
    masks = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, 1.0]], dtype=torch.float64)

    def solve(z):
        def masked(params, step):
            return {"w": (z[3:] + params["w"]) * masks[step - 1]}

        return run(kind(lr=0.1, **options), {"w": z[:3]}, steps, masked)["w"]

    return solve, torch.tensor([0.2, 0.0, 0.5, 0.1, 0.0, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam, Adamax])
def test_plain_autograd_has_the_derivatives_of_transforms(kind, eps, steps):
    """Where all hyperparameters are numbers, the root has a derivative of its own; at zero gradients as well."""
    solve, z = masked_run(kind, {"eps": eps}, steps)
    first, second = jacrev(solve)(z), jacrev(jacrev(solve))(z)
    plain = torch.autograd.functional.jacobian
    torch.testing.assert_close(plain(solve, z), first)
    torch.testing.assert_close(plain(lambda z: plain(solve, z, create_graph=True), z), second)


@generic
def test_derivatives_with_numbers_are_those_of_finite_differences(kind, options):
    def solve(theta):
        return run(kind(**options), {"net.0.bias": theta}, steps=3)["net.0.bias"]

    theta = start()["net.0.bias"].requires_grad_()
    assert gradcheck(solve, theta, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(solve, theta, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SGD(lr=-1), ValueError, "Expected `SGD(lr=...)` to be a non-negative number, got -1."),
        (lambda: SGD(lr=float("nan")), ValueError, "Expected `SGD(lr=...)` to be a non-negative number, got nan."),
        (lambda: SGD(lr=float("inf")), ValueError, "Expected `SGD(lr=...)` to be a non-negative number, got inf."),
        (lambda: SGD(lr="0.1"), ValueError, "Expected `SGD(lr=...)` to be a non-negative number, got '0.1'."),
        (lambda: SGD(lr={"a": -1}), ValueError, "Expected `SGD(lr['a']=...)` to be a non-negative number, got -1."),
        (lambda: SGD(lr={"a": {}}), ValueError, "Expected `SGD(lr['a']=...)` to be a number or a tensor, got {}."),
        (lambda: SGD(momentum=-1), ValueError, "Expected `SGD(momentum=...)` to be a non-negative number, got -1."),
        (lambda: Adam(betas=(0.9,)), ValueError, "Expected `Adam(betas=...)` to be a pair, got (0.9,)."),
        (lambda: Adam(betas=(1, 0)), ValueError, "Expected `Adam(betas[0]=...)` to be a number in [0, 1), got 1."),
        (lambda: AdamW(betas=(0, {"*": -1})), ValueError, "Expected `AdamW(betas[1]['*']=...)` to be a number in"),
        (lambda: RMSprop(alpha=-1), ValueError, "Expected `RMSprop(alpha=...)` to be a non-negative number, got -1."),
        (lambda: NAdam(betas=(0.9,)), ValueError, "Expected `NAdam(betas=...)` to be a pair, got (0.9,)."),
        (lambda: RAdam(betas=(0, 1)), ValueError, "Expected `RAdam(betas[1]=...)` to be a number in [0, 1), got 1."),
        (lambda: Adamax(lr=-1), ValueError, "Expected `Adamax(lr=...)` to be a non-negative number, got -1."),
        (lambda: Adadelta(rho=2), ValueError, "Expected `Adadelta(rho=...)` to be a number in [0, 1), got 2."),
        (lambda: Lion(betas=(-1, 0)), ValueError, "Expected `Lion(betas[0]=...)` to be a number in [0, 1), got -1."),
        (lambda: Adagrad(eps=-1), ValueError, "Expected `Adagrad(eps=...)` to be a non-negative number, got -1."),
        (lambda: SGD(nesterov=True), MisconfigurationError, "Cannot use `SGD(nesterov=True)` with zero momentum."),
        (lambda: SGD(nesterov=True, momentum=0.9, dampening=0.1), MisconfigurationError,
         "Cannot use `SGD(nesterov=True)` with dampening."),
        (lambda: run(SGD(lr={"net.*": 0.1, "*.bias": 1}), start()), ValueError,
         "Expected `SGD(lr=...)` to be a mapping with a pattern for the inner parameter 'scale', "
         "got ['net.*', '*.bias']. A last pattern \"*\" matches the rest."),
        (lambda: Adam(betas=(0.9, {})).init(start()), ValueError,
         "Expected `Adam(betas[1]=...)` to be a mapping with a pattern for the inner parameter 'net.0.weight', got []"),
        (lambda: run(SGD(lr=torch.ones(3)), start()), ValueError,
         "Expected `SGD(lr=...)` to be a tensor that broadcasts to (), the shape of 'scale', got (3,)."),
        (lambda: run(SGD(lr={"*": torch.ones(2, 1, 1)}), start()), ValueError,
         "Expected `SGD(lr=...)` to be a tensor that broadcasts to (2, 3), the shape of 'net.0.weight', got (2, 1, 1)"),
    ],
)  # fmt: skip
def test_misuse_is_refused_by_name(make, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        make()
