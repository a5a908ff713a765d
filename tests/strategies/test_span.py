"""Orthonormal directions out of vectors: what they span, what is left out, and what they take."""

from __future__ import annotations

import pytest
import torch

from lightning_bilevel import tree
from lightning_bilevel.strategies.span import Span
from tests.support.problems import draw

LIKE = {"a": torch.zeros(2, 3, dtype=torch.float64), "b": torch.zeros(4, dtype=torch.float64)}
N = 10


def vector(seed: int) -> dict[str, torch.Tensor]:
    return tree.unflatten(draw(N, seed=seed), LIKE)


def matrix(span: Span) -> torch.Tensor:
    return torch.stack([tree.flatten(row) for row in span.named().values()])


def test_directions_are_orthonormal_and_span_the_vectors() -> None:
    span, vectors = Span(LIKE, 3), [vector(seed) for seed in range(3)]
    for number, each in enumerate(vectors):
        assert span.add(str(number), each) == tree.norm(each)
    q = matrix(span)
    torch.testing.assert_close(q @ q.T, torch.eye(3, dtype=torch.float64))
    flat = torch.stack([tree.flatten(each) for each in vectors])
    torch.testing.assert_close(flat @ q.T @ q, flat)
    torch.testing.assert_close(q[0], flat[0] / flat[0].norm())
    stacked = span.stacked()
    assert stacked is not None
    assert stacked["a"].shape == (3, 2, 3)
    assert stacked["a"].data_ptr() == span.named()["0"]["a"].data_ptr()  # views, both of them


def test_what_has_no_direction_of_its_own_is_left_out() -> None:
    span = Span(LIKE, 3)
    assert span.stacked() is None
    first = vector(0)
    span.add("first", first)
    nearly = tree.add(first, vector(1), alpha=1e-5)
    for name, each in (("zero", tree.zeros_like(LIKE)), ("twice", tree.scale(first, -2)), ("nearly", nearly)):
        span.add(name, each)
    for entry in (float("nan"), float("inf")):
        assert not torch.isfinite(span.add(str(entry), {**first, "b": torch.full_like(first["b"], entry)}))
    assert list(span.named()) == ["first"]


def test_no_more_than_there_is_room_for() -> None:
    span = Span(LIKE, 1)
    span.add("first", vector(0))
    span.add("second", vector(1))
    assert list(span.named()) == ["first"]
    none = Span(LIKE, 0)
    none.add("first", vector(0))
    assert none.named() == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_directions_have_the_dtype_of_the_parameters(dtype: torch.dtype) -> None:
    like = {"w": torch.zeros(1000, dtype=dtype)}
    span = Span(like, 2)
    for seed in (0, 1):
        span.add(str(seed), {"w": draw(1000, seed=seed).float()})
    rows = [each["w"] for each in span.named().values()]
    assert all(row.dtype == dtype for row in rows)
    q = torch.stack(rows).double()
    torch.testing.assert_close(q @ q.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=torch.finfo(dtype).eps)
