"""Kronecker factors of the curvature of layers: a solver, and a preconditioner for conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_bilevel import tree
from lightning_bilevel.errors import combination_error, integer, number
from lightning_bilevel.linear_solvers.base import LinearSolver, LinearSystem, MatVec, Solution
from lightning_bilevel.tree import Params


class KFAC(LinearSolver):
    r"""Take the inverse of a block-diagonal approximation with two Kronecker factors a layer; no products with A.

    .. math:: x_\ell = (A_\ell \otimes G_\ell + \lambda I)^{-1} b_\ell, \qquad
              A_\ell = \sum_n \tau_n a_n a_n^\top, \quad G_\ell = \sum_n J_n^\top H_n J_n, \quad
              \tau_n = \mathrm{tr}(J_n^\top H_n J_n) / \mathrm{tr}\, G_\ell

    for every linear and 2-d convolutional layer ℓ of the inner loss, its bias joined to its weight: a_n is its input in
    row n (an example; a position of a sequence, a patch of an image), J_n the derivative of the net's outputs, those of
    the last such layer, by its output, and H_n ⪰ 0 the second derivative of the loss by the outputs. So it approximates
    the Gauss–Newton matrix, which is positive semidefinite whatever the Hessian is. Exact, within a layer, for one row,
    and for the squared error of a linear layer, with example weights too: τ weighs the inputs as the curvature does.
    Parameters of other layers have x = b/λ.

    Memory: two squares a layer, and the inputs of the layers. Cost: C backward passes for C outputs, or ``samples`` of
    them, one eigendecomposition a factor, and four products of the size of the layer each time it is used.

    Biased as a solver. Best as what preconditions conjugate gradients, where a bad factor costs iterations and no
    correctness: ``ConjugateGradient(max_iter=5, damping=1e-3, preconditioner=KFAC(damping=1e-3))``. It pays where a
    product is dear, and little on small nets. Not with as many outputs as a vocabulary has: H_n has C² entries a row.

    Paper: Martens and Grosse (2015), arXiv 1503.05671; Grosse and Martens (2016), arXiv 1602.01407, for convolutions.

    Args:
        damping: λ, of the inverse; with weight decay in the inner optimizer, at least that.
        samples: random vectors s with E[s sᵀ] = H_n in place of all C columns; ``None``: all.
        seed: of these.

    Raises:
        ValueError: ``damping`` is not positive, or ``samples`` not a positive integer.

    On ½ Σ_n (wᵀa_n − y_n)², whose Hessian is Σ_n a_n a_nᵀ:

    >>> inputs, theta = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), {"w": torch.tensor([[0.5, 1.0]])}
    >>> loss = lambda theta: F.linear(inputs, theta["w"]).square().sum() / 2
    >>> inverse = KFAC(damping=1e-3).make_preconditioner(loss, theta)
    >>> inverse({"w": torch.tensor([[2.0, 2.0]])})["w"].round(decimals=2)
    tensor([[1., 0.]])
    """

    needs_symmetric = True
    needs_whole_vectors = True

    def __init__(self, damping: float = 1e-3, samples: int | None = None, seed: int = 0) -> None:
        self.damping = number("KFAC(damping=...)", damping, above=0)
        self.samples = None if samples is None else integer("KFAC(samples=...)", samples)
        self.seed = integer("KFAC(seed=...)", seed, least=0)

    @override
    def make_preconditioner(self, loss: Callable[[Params], Tensor], theta: Params) -> MatVec:
        """Return v ↦ (A ⊗ G + λI)⁻¹ v, with the factors of ``loss`` at ``theta``."""
        with torch.enable_grad():
            leaves = tree.leaves(theta)
            with _recorded(leaves) as layers:
                value = loss(leaves)
            blocks = [block for block in _factors(value, layers, self._columns) if block is not None]

        def inverse(v: Params) -> Params:
            found = tree.scale(v, 1 / self.damping)
            for block in blocks:
                found.update(block.inverse(v, self.damping))
            return found

        return inverse

    @override
    def solve(self, system: LinearSystem) -> Solution:
        """Return P b.

        Raises:
            MisconfigurationError: A is not symmetric, or the system has no preconditioner.
        """
        self.check(system)
        if system.precondition is None:
            raise combination_error(
                "`KFAC` with a linear system that has no preconditioner",
                "its factors are made from a loss, not from products",
                "Put `precondition=solver.make_preconditioner(loss, theta)` into the system; `ImplicitGradient` does",
            )
        return Solution(tree.detach(system.precondition(system.b)), None, 0, None)

    def _columns(self, root: Tensor) -> Iterator[Tensor]:
        """Yield S e_c, or S ε / √samples, for S of shape ``(rows, C, C)``."""
        if self.samples is None:
            yield from root.unbind(-1)
            return
        generator = torch.Generator(root.device).manual_seed(self.seed)
        for _ in range(self.samples):
            signs = torch.randint(0, 2, root.shape[:2], generator=generator, device=root.device) * 2 - 1
            yield torch.einsum("rij,rj->ri", root, signs.to(root)) / self.samples**0.5


class _Layer(NamedTuple):
    """A call of a layer: its names, its inputs by row, ``(rows, in)``, and its output."""

    weight: str
    bias: str | None
    rows: Tensor
    output: Tensor
    channels: bool


class _Block(NamedTuple):
    """The eigendecompositions of both factors of a layer."""

    weight: str
    bias: str | None
    inputs: tuple[Tensor, Tensor]
    outputs: tuple[Tensor, Tensor]

    def inverse(self, v: Params, damping: float) -> Params:
        matrix = v[self.weight].flatten(1)
        if self.bias is not None:
            matrix = torch.cat([matrix, v[self.bias][:, None]], 1)
        (a, q_a), (g, q_g) = self.inputs, self.outputs
        turned = q_g.T @ matrix.to(q_g) @ q_a / (torch.outer(g, a) + damping)
        back = (q_g @ turned @ q_a.T).to(matrix)
        if self.bias is None:
            return {self.weight: back.view_as(v[self.weight])}
        return {self.weight: back[:, :-1].reshape(v[self.weight].shape), self.bias: back[:, -1]}


@contextmanager
def _recorded(theta: Params) -> Iterator[list[_Layer]]:
    """Record the calls of linear and convolutional layers whose weight is a tensor of θ itself."""
    layers: list[_Layer] = []
    names = {id(value): name for name, value in theta.items()}
    linear, conv2d = F.linear, F.conv2d

    def recorded_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = linear(input, weight, bias)
        if (name := names.get(id(weight))) is not None and not weight.is_complex():
            rows = input.detach().reshape(-1, input.shape[-1])
            layers.append(_with_bias(_Layer(name, names.get(id(bias)), rows, output, channels=False)))
        return output

    def recorded_conv2d(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        output = conv2d(input, weight, bias, stride, padding, dilation, groups)
        usual = groups == 1 and not isinstance(padding, str) and input.dim() == 4 and not weight.is_complex()
        if usual and (name := names.get(id(weight))) is not None:
            patches = F.unfold(input.detach(), weight.shape[2:], dilation, padding, stride)  # (batch, in, places)
            rows = patches.mT.reshape(-1, patches.shape[1])
            layers.append(_with_bias(_Layer(name, names.get(id(bias)), rows, output, channels=True)))
        return output

    F.linear, F.conv2d = recorded_linear, recorded_conv2d  # type: ignore[assignment]
    try:
        yield layers
    finally:
        F.linear, F.conv2d = linear, conv2d


def _with_bias(layer: _Layer) -> _Layer:
    if layer.bias is None:
        return layer
    return layer._replace(rows=torch.cat([layer.rows, layer.rows.new_ones(len(layer.rows), 1)], 1))


def _by_row(values: Tensor, channels: bool) -> Tensor:
    """Return what belongs to an output as ``(rows, out)``."""
    values = values.movedim(1, -1) if channels else values
    return values.reshape(-1, values.shape[-1])


def _from_rows(rows: Tensor, like: Tensor, channels: bool) -> Tensor:
    """The inverse of :func:`_by_row`."""
    if not channels:
        return rows.view_as(like)
    return rows.reshape(*like.movedim(1, -1).shape).movedim(-1, 1)


def _factors(
    loss: Tensor, layers: list[_Layer], columns: Callable[[Tensor], Iterator[Tensor]]
) -> Iterator[_Block | None]:
    """Yield a block for each weight, ``None`` for one without curvature."""
    gradients: list[list[Tensor]] = [[] for _ in layers]  # of each layer: (rows, out), one for each column of a root
    reached: set[int] = set()
    outputs = [layer.output for layer in layers]
    while waiting := [number for number in range(len(layers)) if number not in reached]:
        head = waiting[-1]  # what no later layer has reached is an output of the net
        reached.add(head)
        for column in columns(_root(loss, layers[head])):
            back = _from_rows(column.to(outputs[head]), outputs[head], layers[head].channels)
            found = torch.autograd.grad(outputs[head], outputs, back, retain_graph=True, allow_unused=True)
            for position, gradient in enumerate(found):
                if gradient is not None:
                    reached.add(position)
                    gradients[position].append(_by_row(gradient, layers[position].channels))
    for name in dict.fromkeys(layer.weight for layer in layers):
        yield _block([(layer, gradients[n]) for n, layer in enumerate(layers) if layer.weight == name])


def _root(loss: Tensor, head: _Layer) -> Tensor:
    """Return S with S Sᵀ = H_n for the second derivative of the loss by each row of the outputs, ``(rows, C, C)``."""
    output = head.output
    (gradient,) = torch.autograd.grad(loss, output, create_graph=True, allow_unused=True)
    rows = _by_row(output, head.channels)
    hessian = rows.new_zeros(len(rows), rows.shape[1], rows.shape[1], dtype=_wide(rows.dtype))
    if gradient is not None and gradient.requires_grad:
        for position in range(rows.shape[1]):
            unit = torch.zeros_like(rows)
            unit[:, position] = 1
            unit = _from_rows(unit, output, head.channels)
            (image,) = torch.autograd.grad(gradient, output, unit.detach(), retain_graph=True, allow_unused=True)
            if image is not None:
                hessian[..., position] = _by_row(image, head.channels)
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    return vectors * values.clamp_min(0).sqrt()[:, None, :]


def _block(calls: list[tuple[_Layer, list[Tensor]]]) -> _Block | None:
    """Return the decomposed factors of a layer, over all rows of all its calls."""
    first = calls[0][0]
    if any(layer.bias != first.bias for layer, _ in calls):
        return None  # one weight with several biases
    dtype = _wide(first.rows.dtype)
    pairs = [
        (layer.rows.to(dtype), torch.stack(each).to(dtype)) for layer, each in calls if each
    ]  # (columns, rows, out)
    if not pairs:
        return None
    traces = [g.square().sum((0, 2)) for _, g in pairs]
    total = torch.cat(traces).sum()
    if not total > 0:
        return None
    inputs = torch.stack([(a * trace[:, None]).T @ a for (a, _), trace in zip(pairs, traces, strict=True)]).sum(0)
    outputs = torch.stack([torch.einsum("cri,crj->ij", g, g) for _, g in pairs]).sum(0)
    (a, q_a), (g, q_g) = torch.linalg.eigh(inputs / total), torch.linalg.eigh(outputs)
    return _Block(first.weight, first.bias, (a.clamp_min(0), q_a), (g.clamp_min(0), q_g))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
