"""Inner optimizers: torch.optim's values, right derivatives of every order and mode, hyperparameters of every form."""

from __future__ import annotations

import inspect
import re
from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, vmap

from lightning_bilevel import tree
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.inner_optimizers import SGD, Adagrad, Adam, AdamW, InnerOptimizer, RMSprop, from_torch

# torch itself calls the deprecated function on the first use of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

TORCH = {kind: getattr(torch.optim, kind.__name__) for kind in (SGD, Adam, AdamW, RMSprop, Adagrad)}
FLAGS = ("nesterov", "maximize", "amsgrad", "centered")
SHAPES = {"net.0.weight": (2, 3), "net.0.bias": (3,), "scale": ()}
STEPS = 10

needs_newer_torch = pytest.mark.skipif(
    "decoupled_weight_decay" not in inspect.signature(torch.optim.Adam).parameters,
    reason="torch.optim of this version has no such option",
)


def grid(kind, **options):
    """All combinations of options, without those that torch.optim refuses too."""
    for values in product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        if not chosen.get("nesterov") or (chosen["momentum"] and not chosen["dampening"]):
            text = ",".join(f"{key}={value}" for key, value in chosen.items())
            yield pytest.param(kind, chosen, id=f"{kind.__name__}-{text}")


BOTH = (False, True)
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
]  # fmt: skip

# Every hyperparameter of every optimizer at a generic point, far from kinks, with the flags that change the formula.
GENERIC = [
    (SGD, {"lr": 0.2, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    (SGD, {"lr": 0.2, "momentum": 0.8, "weight_decay": 0.1, "nesterov": True, "maximize": True}),
    *((kind, {"lr": 0.2, "betas": (0.7, 0.9), "eps": 0.1, "weight_decay": 0.1, "amsgrad": amsgrad})
      for kind in (Adam, AdamW) for amsgrad in BOTH),
    *((RMSprop, {"lr": 0.2, "alpha": 0.8, "eps": 0.1, "weight_decay": 0.1, "momentum": 0.6, "centered": centered})
      for centered in BOTH),
    (Adagrad, {"lr": 0.2, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 0.1}),
]  # fmt: skip
generic = pytest.mark.parametrize(
    ("kind", "options"), GENERIC, ids=[f"{kind.__name__}-{[f for f in FLAGS if o.get(f)]}" for kind, o in GENERIC]
)
ADAPTIVE = [
    *((kind, {"amsgrad": amsgrad}) for kind in (Adam, AdamW) for amsgrad in BOTH),
    *((RMSprop, {"centered": centered, "momentum": momentum}) for centered in BOTH for momentum in (0, 0.9)),
    (Adagrad, {}),
]


def draw(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


NOISE = [draw(SHAPES, seed=100 + step) for step in range(STEPS + 1)]
for noise in NOISE:
    noise["net.0.weight"][0, 0] = 0.0


def gradient(params, step):
    """A smooth gradient that depends on the parameters and on the step; its first entry vanishes with the parameter."""
    return {name: torch.sin(param) + NOISE[step][name] for name, param in params.items()}


def start():
    params = draw(SHAPES)
    params["net.0.weight"][0, 0] = 0.0
    return params


def run(optimizer, params, steps=STEPS, gradient=gradient):
    slots = optimizer.init(params)
    for step in range(1, steps + 1):
        params, slots = optimizer.update(params, gradient(params, step), slots, step)
    return params


def run_torch(optimizer, params, steps=STEPS):
    for step in range(1, steps + 1):
        for name, grad in gradient(tree.detach(params), step).items():
            params[name].grad = grad
        optimizer.step()
    return tree.detach(params)


def transform(options, form):
    """Apply ``form`` to every hyperparameter, leave flags alone."""

    def change(name, value):
        if name in FLAGS:
            return value
        return tuple(map(form, value)) if name == "betas" else form(value)

    return {name: change(name, value) for name, value in options.items()}


FORMS = {
    "number": lambda value: value,
    "tensor": lambda value: torch.tensor(value, dtype=torch.float64),
    "shaped": lambda value: {n: torch.full(s, value, dtype=torch.float64) for n, s in SHAPES.items()},
    "patterns": lambda value: {"net.*.bias": value, "net.*": torch.tensor(value, dtype=torch.float64), "*": value},
}


@pytest.mark.parametrize(("kind", "options"), EVERY_OPTION)
def test_values_are_those_of_torch_optim(kind, options):
    leaves = tree.leaves(tree.map(torch.clone, start()))
    expected = run_torch(TORCH[kind](leaves.values(), lr=0.05, **options), leaves)
    torch.testing.assert_close(run(kind(lr=0.05, **options), start()), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", [name for name in FORMS if name != "number"])
@generic
def test_forms_of_hyperparameters_agree(kind, options, form):
    expected = run(kind(**options), start())
    actual = run(kind(**transform(options, FORMS[form])), start())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


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


@generic
def test_unequal_rates_reach_their_parameters(kind, options):
    """Meta-SGD: one rate an entry; it acts on its entry only."""
    rates = tree.map(lambda value: value.abs() / 10 + 0.05, draw(SHAPES, seed=7))
    result = run(kind(**options | {"lr": rates}), start())
    for name in SHAPES:
        for position, rate in enumerate(rates[name].flatten().tolist()):
            alone = run(kind(**options | {"lr": rate}), start())[name].flatten()[position]
            torch.testing.assert_close(result[name].flatten()[position], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("patterns", "matched"),
    [
        ({"net.0.*": 0.1, "*": 0.01}, [0.1, 0.1, 0.01]),
        ({"*": 0.01, "net.0.*": 0.1}, [0.01, 0.01, 0.01]),
        ({"*.bias": 0.0, "*.weight": 0.2, "scale": 0.3}, [0.2, 0.0, 0.3]),
        ({"net.[0-4].weight": 1, "*": 0.5}, [1, 0.5, 0.5]),
    ],
)
def test_first_matching_pattern_wins(patterns, matched):
    params, grads = start(), gradient(start(), 1)
    result, _ = SGD(lr=patterns).update(params, grads, {}, 1)
    expected = {name: params[name] - rate * grads[name] for name, rate in zip(params, matched, strict=True)}
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("form", FORMS)
@generic
def test_stacked_parameters_are_the_loop_over_items(kind, options, form):
    """Also under vmap, whose function sees the items."""
    items = [draw(SHAPES, seed=seed) for seed in (11, 12, 13)]
    optimizer = kind(**transform(options, FORMS[form]))
    expected = tree.stack([run(optimizer, item, steps=3) for item in items])
    torch.testing.assert_close(run(optimizer, tree.stack(items), steps=3), expected)
    torch.testing.assert_close(vmap(lambda item: run(optimizer, item, steps=3))(tree.stack(items)), expected)


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
@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop, Adagrad])
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


@pytest.mark.parametrize("root_over_eps", [1e-12, 1e-6, 1.0, 1e6])
def test_a_root_below_eps_loses_no_digits_that_count(root_over_eps):
    """In float32, θ_1 - θ_0 = -lr g / (|g| + eps) has the derivative -lr eps / (|g| + eps)²."""
    eps = 1e-4
    grad = torch.tensor([root_over_eps * eps], requires_grad=True)
    optimizer, theta = Adam(lr=1.0, eps=eps), {"w": torch.zeros(1)}
    new, _ = optimizer.update(theta, {"w": grad}, optimizer.init(theta), 1)
    (derivative,) = torch.autograd.grad(new["w"], grad)
    error = abs(derivative.item() + eps / (grad.item() + eps) ** 2)
    assert error * (grad.item() + eps) < 1e-6  # of the two terms that are subtracted, which are 1 / (|g| + eps)


def test_what_adam_holds_of_a_step():
    """The gradient, the mean and the denominator: nothing else is of the size of the parameter."""
    size = 1000
    held = set()
    theta = {"w": torch.zeros(size, requires_grad=True)}
    grad = {"w": torch.ones(size).requires_grad_() * 2.0}
    optimizer = Adam()

    def note(tensor):
        if tensor.numel() == size:
            held.add(tensor.data_ptr())
        return tensor

    slots = optimizer.init(theta)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        new = optimizer.update(theta, grad, slots, 1)
    assert len(held) == 3, new


@generic
def test_nothing_is_changed_in_place_and_order_is_kept(kind, options):
    params, optimizer = start(), kind(**options)
    slots, grads = optimizer.init(params), gradient(params, 1)
    before = [tensor._version for values in (params, grads, *slots.values()) for tensor in values.values()]
    new_params, new_slots = optimizer.update(params, grads, slots, 1)
    optimizer.update(new_params, grads, new_slots, 2)
    assert before == [tensor._version for values in (params, grads, *slots.values()) for tensor in values.values()]
    assert list(new_params) == list(SHAPES)
    assert list(new_slots) == list(slots)
    assert all(list(values) == list(SHAPES) for values in new_slots.values())
    assert all(tensor.shape == SHAPES[name] for values in slots.values() for name, tensor in values.items())


@pytest.mark.parametrize(
    ("optimizer", "slots"),
    [
        (SGD(), {}),
        (SGD(momentum=torch.tensor(0.0)), {"momentum": [*SHAPES]}),
        (SGD(momentum={"scale": 0.9, "*": 0}), {"momentum": ["scale"]}),
        (Adam(), {"exp_avg": [*SHAPES], "exp_avg_sq": [*SHAPES]}),
        (AdamW(amsgrad=True), {"exp_avg": [*SHAPES], "exp_avg_sq": [*SHAPES], "max_exp_avg_sq": [*SHAPES]}),
        (RMSprop(), {"square_avg": [*SHAPES]}),
        (RMSprop(momentum={"scale": 0.9, "*": 0}, centered=True),
         {"square_avg": [*SHAPES], "grad_avg": [*SHAPES], "momentum": ["scale"]}),
        (Adagrad(), {"sum": [*SHAPES]}),
    ],
)  # fmt: skip
def test_slots_are_those_that_are_needed(optimizer, slots):
    assert {slot: list(values) for slot, values in optimizer.init(start()).items()} == slots
    run(optimizer, start(), steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@generic
def test_hyperparameters_of_another_dtype_change_no_dtype(kind, options, form, dtype):
    params = tree.map(lambda value: value.to(dtype), start())
    optimizer = kind(**transform(options, FORMS[form]))
    slots = optimizer.init(params)
    for step in (1, 2):
        params, slots = optimizer.update(params, params, slots, step)
    assert {value.dtype for values in (params, *slots.values()) for value in values.values()} == {dtype}
    assert {name: value.shape for name, value in params.items()} == SHAPES


def test_one_entry_rate_keeps_the_shape_of_a_scalar_parameter():
    rate = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    new, _ = SGD(lr=rate).update(start(), start(), {}, 1)
    assert {name: value.shape for name, value in new.items()} == SHAPES
    torch.autograd.grad(new["scale"], rate)


def test_rounding_below_zero_variance_is_not_nan():
    """With a constant gradient the centered square average is 0 up to rounding."""
    params = run(RMSprop(alpha=0.1, centered=True), start(), 60, lambda params, step: tree.map(torch.ones_like, params))
    assert tree.first_nonfinite(params) is None


@pytest.mark.parametrize(
    ("kind", "common", "second"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.2, "momentum": 0, "weight_decay": 0.1}),
        pytest.param(
            torch.optim.SGD,
            {"lr": torch.tensor([0.1]), "nesterov": True, "momentum": 0.9},
            {"momentum": 0.5},
            marks=needs_newer_torch,
        ),
        (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}, {"betas": (0.8, 0.9), "weight_decay": 0.1}),
        pytest.param(
            torch.optim.Adam,
            {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
            {"eps": 1e-2},
            marks=needs_newer_torch,
        ),
        (torch.optim.AdamW, {"lr": 0.1, "foreach": False, "capturable": False}, {"weight_decay": 0.1}),
        (torch.optim.RMSprop, {"lr": 0.1, "centered": True}, {"alpha": 0.5, "momentum": 0.9}),
        (torch.optim.Adagrad, {"initial_accumulator_value": 0.3}, {"lr": 0.2, "lr_decay": 0.1, "maximize": False}),
    ],
)
def test_from_torch_has_the_values_of_the_instance(kind, common, second):
    """With groups, and names that are patterns themselves."""
    names = ["w[0]", "w[1]*", "w?"]
    leaves = tree.leaves(dict(zip(names, start().values(), strict=True)))
    a, b, c = leaves.values()
    optimizer = kind([{"params": [a, c]}, {"params": [b], **second}], **common)
    by_shape = dict(zip(SHAPES, leaves.values(), strict=True))

    def renamed(params, step):
        return dict(zip(names, gradient(dict(zip(SHAPES, params.values(), strict=True)), step).values(), strict=True))

    actual = run(from_torch(optimizer, leaves), tree.map(torch.clone, tree.detach(leaves)), gradient=renamed)
    expected = dict(zip(names, run_torch(optimizer, by_shape).values(), strict=True))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_from_torch_merges_what_groups_share():
    leaves = tree.leaves(start())
    groups = [{"params": [leaf]} for leaf in leaves.values()] + [{"params": [torch.ones(1)], "lr": 5.0}]
    optimizer = from_torch(torch.optim.Adam(groups, lr=0.1), leaves)
    assert type(optimizer) is Adam
    assert optimizer.hyperparameters == {
        "lr": 0.1, "betas[0]": 0.9, "betas[1]": 0.999, "eps": 1e-8, "weight_decay": 0
    }  # fmt: skip


class MySGD(torch.optim.SGD):
    pass


def convert(kind, held=("net.0.weight", "net.0.bias", "scale"), second=None, **options):
    leaves = tree.leaves(start())
    first, *rest = [leaves[name] for name in held]
    return from_torch(kind([{"params": [first]}, {"params": rest, **(second or {})}], **options), leaves)


SUPPORTED = "Expected `from_torch(optimizer)` to be one of torch.optim's `SGD`, `Adam`, `AdamW`, `RMSprop`, `Adagrad`, "


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
        (lambda: convert(torch.optim.NAdam), ValueError, SUPPORTED + "not a subclass, got 'torch.optim.nadam.NAdam'."),
        (lambda: convert(MySGD), ValueError, SUPPORTED),
        (lambda: convert(torch.optim.SGD, held=["scale", "net.0.bias"]), MisconfigurationError,
         "Cannot use this `SGD` as the inner optimizer. This is because it does not hold the inner parameters "
         "['net.0.weight']."),
        (lambda: convert(torch.optim.Adam, second={"amsgrad": True}), MisconfigurationError,
         "Cannot use parameter groups that differ in `amsgrad`."),
    ],
)  # fmt: skip
def test_misuse_is_refused_by_name(make, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        make()


def test_every_optimizer_is_elementwise():
    assert all(issubclass(kind, InnerOptimizer) and kind.elementwise for kind in TORCH)
