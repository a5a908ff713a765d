"""Graphs run as they are written: what Inductor makes of them is in the tests that say so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.guards

from lightning_bilevel.compiled import losses, plan, program


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave Inductor out, and Dynamo without a trace of a test."""
    for module in (plan, losses):
        monkeypatch.setattr(module, "backend_for", lambda kind: "flat")
    monkeypatch.setattr(
        torch._dynamo.guards, "profile_guard_manager", lambda *args: 0.0
    )  # flushes caches, half the time
    yield
    torch._dynamo.reset()


@pytest.fixture
def by_inductor(backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Inductor compile all the same."""
    for module in (plan, losses):
        monkeypatch.setattr(module, "backend_for", lambda kind: "inductor")


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each graph be one of a single step."""
    monkeypatch.setattr(plan, "MOST_NODES", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each call of a graph."""
    seen: list[int] = []
    original = program.Part.__call__

    def counted(self: program.Part, steps: int, args: list[torch.Tensor]) -> object:
        seen.append(steps)
        return original(self, steps, args)

    monkeypatch.setattr(program.Part, "__call__", counted)
    return seen
