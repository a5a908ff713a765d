"""Updates entry by entry: stacked parameters, slots, nothing in place."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

from lightning_bilevel import tree
from lightning_bilevel.inner_optimizers import SGD, Adagrad, Adam, AdamW, InnerOptimizer, RMSprop
from tests.support.optimizers import FORMS, SHAPES, TORCH, draw, generic, gradient, run, start, transform


@pytest.mark.parametrize("form", FORMS)
@generic
def test_stacked_parameters_are_the_loop_over_items(kind, options, form):
    """Also under vmap, whose function sees the items."""
    items = [draw(SHAPES, seed=seed) for seed in (11, 12, 13)]
    optimizer = kind(**transform(options, FORMS[form]))
    expected = tree.stack([run(optimizer, item, steps=3) for item in items])
    torch.testing.assert_close(run(optimizer, tree.stack(items), steps=3), expected)
    torch.testing.assert_close(vmap(lambda item: run(optimizer, item, steps=3))(tree.stack(items)), expected)


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


def test_every_optimizer_is_elementwise():
    assert all(issubclass(kind, InnerOptimizer) and kind.elementwise for kind in TORCH)
