"""Physics-informed nets: solvers of differential equations."""

from __future__ import annotations

from typing import Any

import lightning.pytorch  # noqa: F401 - the package's namespace
import torch
from pina import Condition, LabelTensor
from pina.model import FeedForward
from pina.problem.zoo import Poisson2DSquareProblem, SupervisedProblem
from pina.solver import (
    PhysicsInformedSingleModelSolver,
    SupervisedSingleModelSolver,
)

from published import Row

DISTRIBUTION = "pina-mathlab"


def points() -> list[Any]:
    """Return two batches of points inside a square and on its boundary."""
    return [
        [(name, {"input": LabelTensor(torch.rand(6, 2), ["x", "y"])}) for name in ("D", "boundary")] for _ in range(2)
    ]


def poisson() -> tuple[Any, Any]:
    """Return the problem, its conditions on points as the package's Trainer would put them, and a net."""
    problem = Poisson2DSquareProblem()
    for name, data in points()[0]:
        problem.conditions[name] = Condition(input=data["input"], equation=problem.conditions[name].equation)
    return problem, FeedForward(2, 1, inner_size=8, n_layers=2, func=torch.nn.Tanh)


def loss(solver: Any, batch: Any) -> torch.Tensor:
    """Return the loss of a training step, which would ask the package's own Trainer how to log it."""
    losses = [solver._compute_condition_loss(solver.problem.conditions[name], data, 0) for name, data in batch]
    return sum(losses).as_subclass(torch.Tensor)


LOSSES = {"inner_loss": loss, "outer_loss": loss}


def physics() -> Row:
    problem, net = poisson()
    module = PhysicsInformedSingleModelSolver(problem, net)
    return Row(
        module, points(), inner="_pina_models.0.model.4", outer="_pina_models.0.model.0", losses=LOSSES, validates=False
    )


def supervised() -> Row:
    problem = SupervisedProblem(torch.rand(6, 2), torch.rand(6, 1))
    module = SupervisedSingleModelSolver(problem, FeedForward(2, 1, inner_size=8, func=torch.nn.Tanh), use_lt=False)
    batches = [[("data", {"input": torch.rand(6, 2), "target": torch.rand(6, 1)})] for _ in range(2)]
    return Row(
        module, batches, inner="_pina_models.0.model.4", outer="_pina_models.0.model.0", losses=LOSSES, validates=False
    )


ROWS = {"PhysicsInformedSingleModelSolver": physics, "SupervisedSingleModelSolver": supervised}
