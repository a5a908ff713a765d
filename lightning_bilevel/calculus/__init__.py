"""The inner step and its derivatives, runs of inner steps, and the outer loss at their end.

Written against :mod:`~lightning_bilevel.problem`; knows no module, no Trainer and no strategy. Read
:mod:`~lightning_bilevel.calculus.base` first: what a step is, and which derivatives it has.
"""

from lightning_bilevel.calculus.base import Condition, InnerStep, Pullback, Pulled, Ruled, Whole
from lightning_bilevel.calculus.outer import OuterEvaluation, outer_graph, outer_value, outer_value_and_grads
from lightning_bilevel.calculus.runs import (
    PushedRun,
    Run,
    last_loss,
    pushed_run,
    run,
    run_checkpointed,
    vector_jacobian,
)
from lightning_bilevel.calculus.step import Mode, inner_step

__all__ = [
    "Condition",
    "InnerStep",
    "Mode",
    "OuterEvaluation",
    "Pullback",
    "Pulled",
    "PushedRun",
    "Ruled",
    "Run",
    "Whole",
    "inner_step",
    "last_loss",
    "outer_graph",
    "outer_value",
    "outer_value_and_grads",
    "pushed_run",
    "run",
    "run_checkpointed",
    "vector_jacobian",
]
