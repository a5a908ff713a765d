"""What the strategies share that take steps of θ down the outer loss, too."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bilevel.errors import MisconfigurationError, combination_error, nonfinite_error
from lightning_bilevel.problem import BilevelProblem
from lightning_bilevel.strategies.stationarity import unseen_by_the_minimum


def refusals_of_joint_steps(
    problem: BilevelProblem, strategy: str, one_step: bool = False
) -> list[MisconfigurationError]:
    """Return refusals of problems in which θ does not go on from step to step, or φ does not act through g.

    Args:
        problem: the problem.
        strategy: the class name.
        one_step: whether more than one inner step is refused, too.
    """
    if problem.shared:  # then the rest does not matter
        shared = f"`{strategy}` with parameters shared by both levels"
        return [combination_error(shared, "θ has to go on from step to step", "Use `ReverseUnroll`")]
    found = unseen_by_the_minimum(problem, strategy, problem.traits.learned())
    if not problem.traits.warm:
        what = f"`{strategy}` with an inner level that starts anew"
        found.append(combination_error(what, "it moves θ by one step for each of φ", "Use `inner_start='warm'`"))
    if one_step and problem.inner_steps != 1:
        what = f"`{strategy}` with `inner_steps={problem.inner_steps}`"
        found.append(combination_error(what, "it takes one inner step per outer step", "Use `inner_steps=1`"))
    return found


def checked_outer_loss(value: Tensor) -> Tensor:
    """Return f, or raise before a step down it makes θ nan as well; one synchronization.

    Raises:
        FloatingPointError: it is nan or infinite.

    >>> checked_outer_loss(torch.tensor(2.0))
    tensor(2.)
    """
    if not torch.isfinite(value):
        raise nonfinite_error("outer loss", value.item(), "Look at the outer loss; lower the inner learning rate.")
    return value
