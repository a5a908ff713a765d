"""The loop in plain PyTorch, and the rules of its inner optimizers, held against ``torch.optim`` and the package."""

from __future__ import annotations

import pytest
import torch

from lightning_bilevel.testing import Quadratic, RidgeSolver, Several
from lightning_bilevel.testing.solved import BETAS, EPS, MOMENTUM, RULES

TORCH = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=MOMENTUM),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=BETAS, eps=EPS),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_are_those_of_torch_and_of_the_package(name: str) -> None:
    rule, optimizer = RULES[name], RULES[name].optimizer(0.1)
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    by_torch = TORCH[name]([parameter])
    mine = ours = {"w": parameter.detach().clone()}
    state, slots = rule.init(mine), optimizer.init(ours)
    for step in range(1, 5):
        grads = {"w": mine["w"] ** 3}
        parameter.grad = parameter.detach() ** 3
        by_torch.step()
        ours, slots = optimizer.update(ours, {"w": ours["w"] ** 3}, slots, step)
        mine, state = rule.update(mine, grads, state, 0.1, step)
        torch.testing.assert_close(mine["w"], parameter.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(mine["w"], ours["w"], rtol=1e-12, atol=0)
    assert set(rule.slots) == set(state) == set(slots)


def test_the_names_of_parameters_are_those_of_the_module() -> None:
    module = Several()
    assert set(module.THETA) | set(module.PHI) == {name for name, _ in module.named_parameters()}
    levels = module.functional().levels
    assert set(levels.inner) == set(module.THETA)
    assert set(levels.outer) == set(module.PHI)


def test_constants_go_along_with_the_module_and_into_no_checkpoint() -> None:
    module = Quadratic().float()
    assert module.A.dtype == module.episode().outer.dtype == torch.float32
    assert set(module.state_dict()) == {"theta", "target"}


def test_a_plain_problem_has_the_solver_too() -> None:
    assert RidgeSolver().plain().problem.solver is not None
    assert Quadratic().plain().problem.solver is None
    with pytest.raises(NotImplementedError):
        Quadratic().minimum({}, [])
