"""What the strategies share that move θ and φ together along f and the value gap g(θ) − min g."""

from __future__ import annotations

from lightning_bilevel.errors import MisconfigurationError, combination_error
from lightning_bilevel.problem import BilevelProblem
from lightning_bilevel.strategies.stationarity import unseen_by_the_minimum


def refusals_of_joint_steps(problem: BilevelProblem, strategy: str) -> list[MisconfigurationError]:
    """Return refusals of problems in which θ does not go on from step to step, or φ does not act through g.

    Args:
        problem: the problem.
        strategy: the class name.
    """
    if problem.shared:  # then the rest does not matter
        shared = f"`{strategy}` with parameters shared by both levels"
        return [combination_error(shared, "θ has to go on from step to step", "Use `ReverseUnroll`")]
    found = unseen_by_the_minimum(problem, strategy, problem.traits.learned())
    if not problem.traits.warm:
        what = f"`{strategy}` with an inner level that starts anew"
        found.append(combination_error(what, "it moves θ by one step for each of φ", "Use `inner_start='warm'`"))
    return found
