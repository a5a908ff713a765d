"""Instances of torch.optim as inner optimizers."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from lightning_bilevel import tree
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.inner_optimizers import Adam, from_torch
from tests.support.optimizers import SHAPES, gradient, run, run_torch, start

needs_newer_torch = pytest.mark.skipif(
    "decoupled_weight_decay" not in inspect.signature(torch.optim.Adam).parameters,
    reason="torch.optim of this version has no such option",
)


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
        (torch.optim.NAdam, {"lr": 0.1, "decoupled_weight_decay": True}, {"momentum_decay": 0.3, "weight_decay": 0.1}),
        (torch.optim.RAdam, {"lr": 0.1, "betas": (0.5, 0.8)}, {"lr": 0.2, "eps": 1e-2, "weight_decay": 0.1}),
        (torch.optim.Adamax, {"lr": 0.1}, {"betas": (0.8, 0.9), "weight_decay": 0.1}),
        (torch.optim.Adadelta, {"lr": 0.5, "rho": 0.7}, {"eps": 1e-2, "weight_decay": 0.1}),
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
        (lambda: convert(torch.optim.ASGD), ValueError, SUPPORTED),
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
