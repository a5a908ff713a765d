"""A physics-informed net û(t, x) = (1 − e^{−t}) NN(t, x) + u(0, x), and its residual in an equation.

The derivatives of the net in t and x are carried forward through its layers beside its values, as Taylor coefficients
are. That costs one matrix product a layer, and leaves the graph shallow enough to be differentiated twice more, by the
inner level and by the hypergradient, where nested calls of ``torch.autograd.grad`` would make it five orders deep.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from pde.equations import Equation


class Net(nn.Module):
    """A tanh net of (t, x) with derivatives.

    Args:
        depth: linear layers.
        width: of the hidden ones.
        order: of the highest derivative in x, 2 or 3.
    """

    def __init__(self, depth: int = 9, width: int = 20, order: int = 2) -> None:
        super().__init__()
        sizes = [2, *[width] * (depth - 1), 1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.order = order
        for layer in self.layers:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return NN, NN_t, NN_x, NN_xx and so on, stacked, shape (2 + order, n), at t and x of shape (n,)."""
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        rows = [torch.stack(pair, -1) for pair in ((t, x), (one, zero), (zero, one))]
        jet = torch.stack(rows + [torch.zeros_like(rows[0])] * (self.order - 1))
        values = (torch.arange(len(jet), device=jet.device) == 0).to(jet)[:, None, None]  # only these get the bias
        for number, layer in enumerate(self.layers):
            jet = torch.addcmul(jet @ layer.weight.T, values, layer.bias)
            if number < len(self.layers) - 1:
                jet = tanh(jet)
        return jet[..., 0]


def tanh(jet: Tensor) -> Tensor:
    """Return tanh of values with derivatives (z, z_t, z_x, z_xx, ...), by Faà di Bruno's formula."""
    a = jet[0].tanh()
    first = 1 - a * a
    chain, z_x = first * jet[1:], jet[2]
    second = -2 * a * first
    square = z_x * z_x
    rows = [a[None], chain[:2], (chain[2] + second * square)[None]]
    if len(jet) > 4:
        third = first * (6 * a * a - 2)
        rows.append((chain[3] + z_x * (3 * second * jet[3] + third * square))[None])
    return torch.cat(rows)


def collocation(equation: Equation, count: int, generator: Generator) -> Tensor:
    """Draw ``count`` points; return rows t, x, u(0, x) and its derivatives in x, shape (3 + order, count)."""
    t = torch.rand(count, generator=generator, dtype=torch.float64)
    x = 2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1
    return torch.stack([t, x, *initial_jet(equation, x)]).float()


def initial_jet(equation: Equation, x: Tensor) -> list[Tensor]:
    """Return u(0, x) and its derivatives in x up to the equation's order."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        jet = [equation.initial(x)]
        for _ in range(equation.order):
            jet.append(torch.autograd.grad(jet[-1].sum(), x, create_graph=True)[0])
    return [value.detach() for value in jet]


def field(net: Net, t: Tensor, x: Tensor, initial: Tensor) -> Tensor:
    """Return û at t and x of shape (n,), with u(0, x) given as ``initial``."""
    return (1 - torch.exp(-t)) * net(t, x)[0] + initial


def loss(equation: Equation, net: Net, points: Tensor, nu: Tensor, ends: int = 64) -> Tensor:
    """Return the mean squared residual û_t − rate(û, û_x, ...) and, at x = ±1, of what the boundary asks.

    At the ends û has the value of u(0, ±1) where that is given, and equal values and derivatives where it is periodic.

    Args:
        equation: the equation.
        net: NN.
        points: from :func:`collocation`.
        nu: ν, 0-dim.
        ends: at the times of how many of the points the two ends are compared.
    """
    t, x, *initial = points.unbind()
    inside, one = len(t), torch.ones_like(t[:ends])
    # One call of the net for all: at this size a call costs what it costs to start its operations.
    jet = net(torch.cat([t, t[:ends], t[:ends]]), torch.cat([x, one, -one]))
    value, in_t, *in_x = jet[:, :inside].unbind()
    remains = torch.exp(-t)
    growth = 1 - remains
    u = [growth * part + start for part, start in zip((value, *in_x), initial, strict=True)]
    residual = remains * value + growth * in_t - equation.rate(*u, nu)
    right, left = jet[:, inside:].chunk(2, dim=1)
    if equation.boundary == "given":
        off = torch.stack([right[0], left[0]])
    else:
        off = torch.stack([right[row] - left[row] for row in (0, 2, 3)])
    return residual.square().mean() + off.square().mean()
