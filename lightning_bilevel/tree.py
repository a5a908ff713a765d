"""Arithmetic on named tensors: ``Params``, the vectors of this library.

Inner parameters, outer parameters, hypergradients, tangents and directions are all
``dict[str, Tensor]`` keyed by the parameter's name in the module. Every function here is
out of place, differentiable, and visits the keys in the order of its first argument.

A complex entry is a pair of real numbers, as it is for autograd, whose gradients are ∂/∂Re + i ∂/∂Im: products of
trees are real, Re(ā b), and a slope is the product of a gradient and a direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Params = dict[str, Tensor]


def map(fn: Callable[..., Tensor], *trees: Params) -> Params:
    """Apply ``fn`` to the tensors of the same name.

    >>> map(torch.mul, {"w": torch.tensor(2.0)}, {"w": torch.tensor(3.0)})
    {'w': tensor(6.)}
    """
    first, *rest = trees
    return {name: fn(value, *(tree[name] for tree in rest)) for name, value in first.items()}


def add(a: Params, b: Params, alpha: float | Tensor = 1.0) -> Params:
    """Return ``a + alpha * b``.

    >>> add({"w": torch.tensor(2.0)}, {"w": torch.tensor(3.0)}, alpha=2.0)
    {'w': tensor(8.)}
    """
    if isinstance(alpha, Tensor):
        return {name: value + alpha * b[name] for name, value in a.items()}
    return {name: torch.add(value, b[name], alpha=alpha) for name, value in a.items()}


def sub(a: Params, b: Params) -> Params:
    """Return ``a - b``.

    >>> sub({"w": torch.tensor(2.0)}, {"w": torch.tensor(3.0)})
    {'w': tensor(-1.)}
    """
    return {name: value - b[name] for name, value in a.items()}


def scale(a: Params, factor: float | Tensor) -> Params:
    """Return ``factor * a``.

    >>> scale({"w": torch.tensor(2.0)}, 0.5)
    {'w': tensor(1.)}
    """
    return {name: value * factor for name, value in a.items()}


def zeros_like(a: Params) -> Params:
    """Return zeros of the same names, shapes, dtypes and devices.

    >>> zeros_like({"w": torch.tensor([2.0])})
    {'w': tensor([0.])}
    """
    return {name: torch.zeros_like(value) for name, value in a.items()}


def dot(a: Params, b: Params) -> Tensor:
    """Return the inner product Σ Re(ā b) over all entries jointly, a real 0-dim tensor.

    >>> dot({"w": torch.ones(2), "b": torch.ones(1)}, {"w": torch.ones(2), "b": torch.ones(1)})
    tensor(3.)
    >>> dot({"z": torch.tensor([1 + 2j])}, {"z": torch.tensor([3 + 4j])})  # 1 · 3 + 2 · 4
    tensor(11.)
    """
    return torch.stack([(value.conj() * b[name]).real.sum() for name, value in a.items()]).sum()


def norm(a: Params) -> Tensor:
    """Return the Euclidean norm over all entries jointly, a real 0-dim tensor.

    >>> norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    >>> norm({"z": torch.tensor([3 + 4j])})
    tensor(5.)
    """
    norms = [torch.linalg.vector_norm(value) for value in a.values()]
    return torch.linalg.vector_norm(torch.stack(norms))


def device(a: Params) -> torch.device:
    """Return the device of the first tensor.

    >>> device({"w": torch.ones(1)})
    device(type='cpu')
    """
    return next(iter(a.values())).device


def count(stacked: Params) -> int:
    """Return how many trees are stacked.

    >>> count({"w": torch.ones(3, 2)})
    3
    """
    return next(iter(stacked.values())).shape[0]


def numel(a: Params) -> int:
    """Return the number of entries over all tensors.

    >>> numel({"w": torch.zeros(2, 3), "b": torch.zeros(2)})
    8
    """
    return sum(value.numel() for value in a.values())


def flatten(a: Params) -> Tensor:
    """Concatenate all entries to one vector of shape ``(numel(a),)``.

    >>> flatten({"w": torch.ones(1, 2), "b": torch.zeros(1)})
    tensor([1., 1., 0.])
    """
    return torch.cat([value.reshape(-1) for value in a.values()])


def unflatten(flat: Tensor, like: Params) -> Params:
    """Cut ``flat`` of shape ``(..., numel(like))`` into views shaped ``(..., *like[name].shape)``.

    >>> unflatten(torch.arange(3.0), {"w": torch.zeros(1, 2), "b": torch.zeros(1)})
    {'w': tensor([[0., 1.]]), 'b': tensor([2.])}
    """
    pieces = flat.split([value.numel() for value in like.values()], dim=-1)
    return {
        name: piece.reshape(flat.shape[:-1] + value.shape).to(value.dtype)
        for (name, value), piece in zip(like.items(), pieces, strict=True)
    }


def detach(a: Params) -> Params:
    """Cut every tensor off its graph; storage is shared.

    >>> detach({"w": torch.ones(1, requires_grad=True)})
    {'w': tensor([1.])}
    """
    return {name: value.detach() for name, value in a.items()}


def leaves(a: Params) -> Params:
    """Return detached leaves that require gradients; storage is shared.

    >>> leaves({"w": torch.ones(1)})
    {'w': tensor([1.], requires_grad=True)}
    """
    return {name: value.detach().requires_grad_() for name, value in a.items()}


def stack(trees: Sequence[Params]) -> Params:
    """Stack trees of equal names and shapes along a new first dimension.

    >>> stack([{"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}])
    {'w': tensor([1., 2.])}
    """
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def expand(a: Params, count: int) -> Params:
    """Repeat every tensor ``count`` times along a new first dimension, as views.

    >>> expand({"w": torch.tensor(1.0)}, 2)
    {'w': tensor([1., 1.])}
    """
    return {name: value.expand(count, *value.shape) for name, value in a.items()}


def index(a: Params, position: int) -> Params:
    """Take one entry along the first dimension of every tensor, as views.

    >>> index({"w": torch.tensor([1.0, 2.0])}, 1)
    {'w': tensor(2.)}
    """
    return {name: value[position] for name, value in a.items()}


def combine(weights: Tensor, stacked: Params) -> Params:
    """Return Σ_i weights_i · stacked_i over the first dimension of every tensor, for real weights.

    >>> combine(torch.tensor([1.0, 2.0]), {"w": torch.tensor([[1.0], [10.0]])})
    {'w': tensor([21.])}
    >>> combine(torch.tensor([1.0, 2.0]), {"z": torch.tensor([[1j], [10j]])})
    {'z': tensor([0.+21.j])}
    """
    return {name: torch.tensordot(weights.to(value.dtype), value, 1) for name, value in stacked.items()}


def outer_product(weights: Tensor, a: Params) -> Params:
    """Return ``weights_i · a`` stacked over i, ``(len(weights), *shape)`` per tensor, for real weights.

    >>> outer_product(torch.tensor([1.0, 2.0]), {"w": torch.tensor([10.0])})
    {'w': tensor([[10.], [20.]])}
    >>> outer_product(torch.tensor([1.0, 2.0]), {"z": torch.tensor([1j])})
    {'z': tensor([[0.+1.j],
            [0.+2.j]])}
    """
    return {name: torch.tensordot(weights.to(value.dtype), value, 0) for name, value in a.items()}


def rows_dot(stacked: Params, vector: Params) -> Tensor:
    """Return :func:`dot` of every row of ``stacked`` with ``vector``, real, shape ``(n,)``, at least in float32.

    >>> rows_dot({"w": torch.tensor([[1.0], [10.0]])}, {"w": torch.tensor([2.0])})
    tensor([ 2., 20.])
    >>> rows_dot({"z": torch.tensor([[1 + 2j], [3 + 4j]])}, {"z": torch.tensor([3 + 4j])})
    tensor([11., 25.])
    """
    number = count(stacked)
    rows = {name: values.reshape(number, -1) for name, values in stacked.items()}
    products = [
        _matvec(rows[name], value.reshape(-1).to(rows[name].dtype).conj()).real for name, value in vector.items()
    ]
    widest = max((product.dtype for product in products), key=lambda dtype: torch.finfo(dtype).bits)
    return torch.stack([product.to(widest) for product in products]).sum(0)


def _matvec(rows: Tensor, vector: Tensor) -> Tensor:
    """Return ``rows @ vector``, of half precision summed in float32: there the product itself is slow on a CPU.

    >>> _matvec(torch.ones(2, 3, dtype=torch.bfloat16), torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16))
    tensor([7., 7.])
    """
    if rows.dtype in (torch.float16, torch.bfloat16):
        return torch.stack([(row * vector).sum(dtype=torch.float32) for row in rows])
    return rows @ vector


def to(a: Params, device: torch.device) -> Params:
    """Move every tensor to ``device``.

    >>> to({"w": torch.ones(1)}, torch.device("cpu"))
    {'w': tensor([1.])}
    """
    return {name: value.to(device) for name, value in a.items()}


def like(a: Params, values: Iterable[Tensor | None]) -> Params:
    """Name ``values`` as ``a`` is named, with zeros where a value is ``None``.

    >>> like({"w": torch.ones(1), "b": torch.ones(1)}, [torch.ones(1), None])
    {'w': tensor([1.]), 'b': tensor([0.])}
    """
    return {
        name: torch.zeros_like(reference) if value is None else value
        for (name, reference), value in zip(a.items(), values, strict=True)
    }


def grad(output: Tensor, inputs: Params, create_graph: bool = False) -> Params:
    """Return the gradient of a scalar ``output``, zeros for inputs it does not depend on.

    Args:
        output: a 0-dim tensor; one that carries no graph has a zero gradient.
        inputs: tensors that require gradients.
        create_graph: keep the graph, for further derivatives.

    >>> w = {"w": torch.tensor(3.0, requires_grad=True)}
    >>> grad(w["w"] ** 2, w)
    {'w': tensor(6.)}
    """
    if not output.requires_grad:
        return zeros_like(inputs)
    values = torch.autograd.grad(output, list(inputs.values()), create_graph=create_graph, allow_unused=True)
    return like(inputs, values)


def first_nonfinite(a: Params) -> str | None:
    """Return the name of the first tensor with a nan or an infinity, or ``None``.

    >>> first_nonfinite({"w": torch.ones(1), "b": torch.tensor(float("nan"))})
    'b'
    """
    return next((name for name, value in a.items() if not torch.isfinite(value).all()), None)
