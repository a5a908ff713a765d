"""Linear layers under vmap, against the loop over members with PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jacfwd, vmap

from lightning_bilevel import Episode, ReverseUnroll, hypergradient
from lightning_bilevel.kernels import linear
from lightning_bilevel.kernels.safe import differentiable_kernels
from tests.support.modules import Maml

MEMBERS = 3
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int | None, ...]]] = {
    "vectors": ((4,), (0, 0, 0)),
    "rows": ((5, 4), (0, 0, 0)),
    "no rows": ((0, 4), (0, 0, 0)),
    "sequences": ((2, 5, 4), (0, 0, 0)),
    "no sequences": ((0, 5, 4), (0, 0, 0)),
    "other dimensions": ((5, 4), (1, 2, 1)),
    "one input for all": ((5, 4), (None, 0, 0)),
    "one vector for all": ((4,), (None, 0, 0)),
    "one bias for all": ((5, 4), (0, 0, None)),
    "one weight for all": ((5, 4), (0, None, 0)),
}


def arguments(name: str) -> tuple[list[Tensor], tuple[int | None, ...]]:
    shape, dims = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    values = []
    for member, dim in zip((shape, (2, 4), (2,)), dims, strict=True):
        full = list(member)
        if dim is not None:
            full.insert(dim, MEMBERS)
        values.append(torch.randn(full, generator=generator, dtype=torch.float64, requires_grad=True))
    return values, dims


def looped(fn: Callable[..., Tensor], values: list[Tensor], dims: tuple[int | None, ...]) -> Tensor:
    members = [[value if dim is None else value.select(dim, i) for value, dim in zip(values, dims, strict=True)]
               for i in range(MEMBERS)]  # fmt: skip
    return torch.stack([fn(*member) for member in members])


def derivatives(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Return the value, a gradient and the gradient of its square."""
    grads = torch.autograd.grad(output.sin().sum(), inputs, create_graph=True)
    again = torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)
    return [output, *grads, *again]


def test_one_number_as_the_bias() -> None:
    """With as many rows as members, it must not be taken for a row of biases."""
    inputs, weights, biases = (torch.randn(MEMBERS, *size) for size in ((MEMBERS, 4), (1, 4), ()))
    expected = looped(F.linear, [inputs, weights, biases], (0, 0, 0))
    torch.testing.assert_close(vmap(linear.linear)(inputs, weights, biases), expected)


@pytest.mark.parametrize("name", SHAPES)
def test_is_the_loop_over_members_to_the_second_derivative(name: str) -> None:
    values, dims = arguments(name)
    expected = derivatives(looped(F.linear, values, dims), values)
    found = derivatives(vmap(linear.linear, in_dims=dims)(*values), values)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in SHAPES if "for all" not in name or "input" in name])
def test_is_one_batched_product(name: str) -> None:
    values, dims = arguments(name)
    with patch.object(linear, "NATIVE", side_effect=AssertionError("PyTorch's own was called")):
        vmap(linear.linear, in_dims=dims)(*values)


@pytest.mark.parametrize("name", ["rows", "one input for all"])
def test_inside_and_around_other_transforms(name: str) -> None:
    """A vmap over directions, forward-mode derivatives, and a vmap over members; and the other way round."""
    values, dims = arguments(name)
    _, weight, bias = (value.detach() for value in values)

    def outside(fn: Callable[..., Tensor]) -> Tensor:
        return jacfwd(lambda w: vmap(fn, in_dims=dims)(values[0], w, bias).sin())(weight)

    def inside(fn: Callable[..., Tensor]) -> Tensor:
        return vmap(jacfwd(lambda x, w, b: fn(x, w, b).sin(), argnums=1), in_dims=dims)(*values)

    for nested in (outside, inside):
        torch.testing.assert_close(nested(linear.linear), nested(F.linear), rtol=1e-12, atol=1e-12)


def test_without_vmap_it_is_the_native_one() -> None:
    (x, weight, bias), _ = arguments("rows")
    assert torch.equal(linear.linear(x[0], weight[0], bias[0]), F.linear(x[0], weight[0], bias[0]))
    assert torch.equal(linear.linear(x[0], weight[0]), F.linear(x[0], weight[0]))


def test_wrong_shapes_get_the_native_error() -> None:
    (x, weight, bias), _ = arguments("rows")

    def message(fn: Callable[..., Tensor]) -> str:
        with pytest.raises(RuntimeError) as caught:
            vmap(fn)(x[..., :3], weight, bias)
        return str(caught.value)

    assert message(linear.linear) == message(F.linear)


def test_in_bfloat16_autocast() -> None:
    values, dims = arguments("rows")
    values = [value.float() for value in values]
    with torch.autocast("cpu", torch.bfloat16):
        found = vmap(linear.linear, in_dims=dims)(*values)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), looped(F.linear, values, dims), rtol=2e-2, atol=2e-2)


def test_stacked_episodes_use_it_and_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    module = Maml(net, lambda found, y: (found - y).square().mean(), inner_start="reset")
    data = [torch.randn(4, 5, 1, dtype=torch.float64) for _ in range(4)]
    episodes = [Episode([(a, b)], (c, d)) for a, b, c, d in zip(*data, strict=True)]
    native, calls = F.linear, []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(torch._C._functorch.is_batchedtensor(weight))
        return linear.linear(x, weight, bias)

    with patch("lightning_bilevel.kernels.safe._ALWAYS", [(F, "linear", counted)]):
        found = hypergradient(module, ReverseUnroll(), episodes)
    assert any(calls)
    assert F.linear is native
    expected = [hypergradient(module, ReverseUnroll(), [episode]) for episode in episodes]
    for name, grad in found.grads.items():
        mean = torch.stack([each.grads[name] for each in expected]).mean(0)
        torch.testing.assert_close(grad, mean, rtol=1e-10, atol=1e-12)
    with differentiable_kernels(module):
        assert F.linear is linear.linear
    assert F.linear is native
