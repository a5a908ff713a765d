"""Inner optimizers at points where their formulas are smooth, and runs of them beside torch.optim's."""

from __future__ import annotations

import pytest
import torch

from lightning_bilevel import tree
from lightning_bilevel.inner_optimizers import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop

KINDS = (SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam, Adamax, Adadelta)
TORCH = {kind: getattr(torch.optim, kind.__name__) for kind in KINDS}
FLAGS = ("nesterov", "maximize", "amsgrad", "centered", "decoupled_weight_decay")
SHAPES = {"net.0.weight": (2, 3), "net.0.bias": (3,), "scale": ()}
STEPS = 10
BOTH = (False, True)

# Every hyperparameter of every optimizer at a generic point, far from kinks, with the flags that change the formula.
GENERIC = [
    (SGD, {"lr": 0.2, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    (SGD, {"lr": 0.2, "momentum": 0.8, "weight_decay": 0.1, "nesterov": True, "maximize": True}),
    *((kind, {"lr": 0.2, "betas": (0.7, 0.9), "eps": 0.1, "weight_decay": 0.1, "amsgrad": amsgrad})
      for kind in (Adam, AdamW) for amsgrad in BOTH),
    *((RMSprop, {"lr": 0.2, "alpha": 0.8, "eps": 0.1, "weight_decay": 0.1, "momentum": 0.6, "centered": centered})
      for centered in BOTH),
    (Adagrad, {"lr": 0.2, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 0.1}),
    *((NAdam, {"lr": 0.2, "betas": (0.7, 0.9), "eps": 0.1, "weight_decay": 0.1, "momentum_decay": 0.3,
               "decoupled_weight_decay": apart}) for apart in BOTH),
    *((RAdam, {"lr": 0.2, "betas": (0.7, 0.9), "eps": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": apart})
      for apart in BOTH),
    (Adamax, {"lr": 0.2, "betas": (0.7, 0.9), "eps": 0.1, "weight_decay": 0.1}),
    (Adadelta, {"lr": 0.9, "rho": 0.7, "eps": 0.1, "weight_decay": 0.1}),
]  # fmt: skip
generic = pytest.mark.parametrize(
    ("kind", "options"), GENERIC, ids=[f"{kind.__name__}-{[f for f in FLAGS if o.get(f)]}" for kind, o in GENERIC]
)


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
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # in which NAdam keeps its product of momenta, whatever the parameters are
    try:
        for step in range(1, steps + 1):
            for name, grad in gradient(tree.detach(params), step).items():
                params[name].grad = grad
            optimizer.step()
    finally:
        torch.set_default_dtype(before)
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
