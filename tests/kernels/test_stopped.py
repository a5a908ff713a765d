"""What stops gradients stops tangents: forward mode has the derivative that reverse mode has.

The oracle is the Jacobian by reverse mode, which honours all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from lightning_bilevel import (
    SGD,
    BilevelModule,
    Episode,
    ForwardGradient,
    ForwardUnroll,
    ReverseUnroll,
    hypergradient,
)
from lightning_bilevel.directions import Orthogonal
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.kernels.stopped import no_grad_stops_tangents
from tests.support.problems import assert_close, draw


def context(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.square().sum()
    return x * scale


@torch.no_grad()
def scale_of(x: Tensor) -> Tensor:
    return x.square().sum()


def decorator(x: Tensor) -> Tensor:
    return x * scale_of(x)


def decorated_generator(x: Tensor) -> Tensor:
    @torch.no_grad()
    def scales():
        yield x.sum()
        yield x.square().sum()

    first, second = scales()
    return x * first * second


def call(x: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    scale = x.square().sum()
    torch.set_grad_enabled(before)
    return x * scale * x.sin()


def switch(x: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        scale = x.square().sum()
    return x * scale


def switch_as_decorator(x: Tensor) -> Tensor:
    return x * torch.set_grad_enabled(False)(lambda: x.square().sum())()


def nested(x: Tensor) -> Tensor:
    with torch.no_grad():
        first = x.sum()
        with torch.enable_grad():
            differentiated = x.square().sum()
        last = x.prod()
    return x * first * differentiated * last


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = x.square().sum()
    return x * scale.clone()


def detached(x: Tensor) -> Tensor:
    return x * x.detach().sum() * x.data.sum() * x.sum().item()


def in_place(x: Tensor) -> Tensor:
    y = 2 * x
    with torch.no_grad():
        y.mul_(3).clamp_(-1, 1)
    return y * y


def copied(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    with torch.no_grad():
        y.copy_(x)
    return y * x


def norm_clipped(x: Tensor) -> Tensor:
    """As gradients are clipped in an update: the scale is a constant."""
    y = 3 * x
    with torch.no_grad():
        scale = (1 / torch.linalg.vector_norm(y)).clamp(max=1)
    return y * scale


def clipped_by_torch(x: Tensor) -> Tensor:
    parameter = nn.Parameter(torch.ones_like(x))
    parameter.grad = x.detach().clone()
    clip_grad_norm_([parameter], 0.1)
    return x * parameter.grad


def left_by_an_error(x: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            raise ArithmeticError
    except ArithmeticError:
        return x * x


def transform_inside(x: Tensor) -> Tensor:
    """``torch.func.grad`` enables gradients for itself, not for what is around it."""
    with torch.no_grad():
        scale = grad(lambda y: (y**3).sum())(x)
    return x * scale


def inside_a_transform(x: Tensor) -> Tensor:
    def loss(y: Tensor) -> Tensor:
        with torch.no_grad():
            scale = y.sum()
        return scale * (y**2).sum()

    return grad(loss)(x) * x


def transform_that_is_not_stopped(x: Tensor) -> Tensor:
    return x * grad(lambda y: (y**3).sum())(x)


def vmap_inside(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = vmap(torch.square)(x)
    return x * scale


def forward_inside(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = jvp(lambda y: y**3, (x,), (torch.ones_like(x),))[1]
    return x * scale


def fixed_point(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = torch.zeros_like(x)
        for _ in range(50):
            y = torch.tanh(0.3 * y + x)
    return torch.tanh(0.3 * y + x)


def checkpointed(x: Tensor) -> Tensor:
    return checkpoint(lambda x: context(x).sin(), x, use_reentrant=False)


FUNCTIONS = [
    context,
    decorator,
    decorated_generator,
    call,
    switch,
    switch_as_decorator,
    nested,
    inference,
    detached,
    in_place,
    copied,
    norm_clipped,
    clipped_by_torch,
    left_by_an_error,
    transform_inside,
    inside_a_transform,
    transform_that_is_not_stopped,
    vmap_inside,
    forward_inside,
    fixed_point,
    checkpointed,
]


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    rows = (torch.autograd.grad(function(leaf)[i], leaf)[0] for i in range(len(x)))
    return torch.stack(list(rows))


@pytest.mark.parametrize("outside", [True, False], ids=["enabled outside", "disabled outside"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_forward_mode_has_the_derivative_of_reverse_mode(function: Callable[[Tensor], Tensor], outside: bool) -> None:
    x, directions = draw(3, seed=1), draw(4, 3, seed=2)
    expected = directions @ jacobian(function, x).T

    def push(v: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(function, (x,), (v,))

    with torch.set_grad_enabled(outside):
        with no_grad_stops_tangents():
            values, together = vmap(push, out_dims=(None, 0))(directions)
            single = torch.stack([push(v)[1] for v in directions])
        assert torch.is_grad_enabled() == outside
        assert torch._C._is_fwd_grad_enabled()
    torch.testing.assert_close(values, function(x))
    torch.testing.assert_close(together, expected)
    torch.testing.assert_close(single, expected)


@pytest.mark.parametrize("function", [context, decorator, call, fixed_point], ids=lambda function: function.__name__)
def test_forward_mode_alone_goes_through(function: Callable[[Tensor], Tensor]) -> None:
    """What the test above has to catch."""
    x, v = draw(3, seed=1), draw(3, seed=2)
    assert not torch.allclose(jvp(function, (x,), (v,))[1], jacobian(function, x) @ v)


def test_everything_is_put_back_after_an_error() -> None:
    native = torch._C._set_grad_enabled

    def fails() -> None:
        torch.set_grad_enabled(False)
        raise ArithmeticError

    with pytest.raises(ArithmeticError), no_grad_stops_tangents():
        fails()
    assert torch._C._set_grad_enabled is native
    assert torch.is_grad_enabled()
    assert torch._C._is_fwd_grad_enabled()


def test_other_threads_keep_their_own_mode() -> None:
    x, v = draw(3, seed=1), draw(3, seed=2)
    ready, go = threading.Event(), threading.Event()

    def other() -> None:
        with torch.no_grad():
            ready.set()
            go.wait()

    thread = threading.Thread(target=other)
    with no_grad_stops_tangents():
        thread.start()
        ready.wait()
        pushed = jvp(lambda x: x.square(), (x,), (v,))[1]
        go.set()
        thread.join()
    torch.testing.assert_close(pushed, 2 * x * v)


# --- Whole runs ---


class Base(BilevelModule):
    def __init__(self) -> None:
        super().__init__(inner_steps=3, inner_start="reset")
        self.w = nn.Parameter(draw(3, seed=1))
        self.p = nn.Parameter(torch.tensor([0.1, -0.05], dtype=torch.float64))

    def inner_parameters(self):
        return [self.w]

    def inner_loss(self, batch):
        return (self.w - batch * self.p[0]).square().sum() + self.p[1].exp() * self.w.square().sum()

    def outer_loss(self, batch):
        return (self.w - batch).square().sum()

    def configure_inner_optimizer(self):
        return SGD(lr=0.1)


class Normalized(InnerOptimizer):
    elementwise = False

    def update(self, params, grads, slots, step):
        with torch.no_grad():
            length = torch.sqrt(sum(g.square().sum() for g in grads.values())) + 1e-3
        return {name: p - 0.1 * grads[name] / length for name, p in params.items()}, {}


class OwnOptimizer(Base):
    def configure_inner_optimizer(self):
        return Normalized()


class OwnStart(Base):
    @torch.no_grad()
    def initial_inner_parameters(self):
        return {"w": torch.stack([self.p[0], self.p[1], self.p.sum()])}


class OwnSolver(Base):
    def solve_inner(self, batches):
        def image(w: Tensor) -> Tensor:
            return torch.tanh(w * self.p[0] + batches[0] * self.p[1])

        with torch.no_grad():
            w = self.w
            for _ in range(50):
                w = image(w)
        return {"w": image(w)}


class OwnLoss(Base):
    def inner_loss(self, batch):
        with torch.no_grad():
            scale = self.w.square().sum() + self.p.exp().sum()
        return super().inner_loss(batch) * scale


@pytest.mark.parametrize("kind", [OwnOptimizer, OwnStart, OwnSolver, OwnLoss], ids=lambda kind: kind.__name__)
def test_exact_strategies_agree(kind: type[Base]) -> None:
    batch = draw(3, seed=2)
    episode = Episode([batch], batch.flip(0))
    expected = hypergradient(kind(), ReverseUnroll(), episode).grads
    for strategy in (
        ForwardUnroll(),
        ForwardUnroll(mode="forward"),
        ForwardGradient(2, directions=Orthogonal()),
        ReverseUnroll(checkpoint=1),
    ):
        if kind is OwnSolver and isinstance(strategy, ReverseUnroll):
            continue
        assert_close(hypergradient(kind(), strategy, episode).grads, expected)
