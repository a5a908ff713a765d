"""Hyperparameters of every form: numbers, tensors, a tensor for each parameter, patterns."""

from __future__ import annotations

import pytest
import torch

from lightning_bilevel import tree
from lightning_bilevel.inner_optimizers import SGD
from tests.support.optimizers import FORMS, SHAPES, draw, generic, gradient, run, start, transform


@pytest.mark.parametrize("form", [name for name in FORMS if name != "number"])
@generic
def test_forms_of_hyperparameters_agree(kind, options, form):
    expected = run(kind(**options), start())
    actual = run(kind(**transform(options, FORMS[form])), start())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


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
