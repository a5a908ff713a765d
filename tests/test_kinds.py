"""Members of the kinds in which a library goes wrong in silence: each is right, or refused.

A row is one situation in a small module. Right is what a plain loop of PyTorch gives, by finite differences; "A plain
loop" calls the module's own methods on its own parameters, and knows nothing of this library.
"""

from __future__ import annotations

import random
from collections import deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_bilevel import SGD, Episode, hypergradient
from lightning_bilevel.inner_optimizers import Adam, InnerOptimizer
from tests.support.kinds import (
    DIFFERENCES,
    EVERY,
    EXACT,
    RATE,
    Small,
    Step,
    episodes,
    flat,
    looped,
    seeded,
    sgd,
    slope,
    unrolled,
)


@dataclass
class Row:
    """A member.

    Attributes:
        kind: what it belongs to.
        member: its name.
        make: the module.
        step: the inner step of the plain loop.
        strategies: those that are held against it.
        chosen: episodes by their number.
        by: how the right hypergradient is found.
    """

    kind: str
    member: str
    make: Callable[[], Any]
    step: Step = sgd
    strategies: dict[str, Any] = field(default_factory=lambda: EVERY)
    chosen: Callable[[int], list[Episode]] = episodes
    by: Callable[..., Tensor] = slope


ROWS: list[Row] = []
WITHOUT_FORWARD_MODE = {name: make for name, make in EVERY.items() if name != "forward mode"}
HOOKED = {name: EVERY[name] for name in ("reverse", "checkpointed", "forward", "forward, one at a time")}


def row(kind: str, member: str, *arguments: Any, **options: Any) -> Callable[[Any], Any]:
    """Add the decorated class to the table."""

    def add(make: Any) -> Any:
        ROWS.append(Row(kind, member, make, *arguments, **options))
        return make

    return add


# ---------------------------------------------------------------------------------------------------------------------
# Hooks
# ---------------------------------------------------------------------------------------------------------------------


def tenth(module: Any, into: Any, out: Any = None) -> Any:
    return tuple(None if grad is None else grad * 0.1 for grad in into)


class Hooked(Small):
    """Its inner loss goes through hooks, its outer loss does not."""

    def inner_loss(self, batch: Any) -> Tensor:
        x, y = batch
        handles = self.hooked()
        try:
            fit = (self.out(self.net[1](self.net[0](x.clone().requires_grad_()))) - y).square().mean()
        finally:
            for handle in handles:
                handle.remove()
        return fit * self.p[0].exp() + self.p[1].exp() * 0.1 * sum(v.square().sum() for v in self.net.parameters())

    def hooked(self) -> list[Any]:
        return []

    def out(self, hidden: Tensor) -> Tensor:
        return self.net[2](hidden)


def hooks(member: str, **options: Any) -> Any:
    return row("hooks", member, by=unrolled, strategies=HOOKED, **options)


@hooks("full backward pre-hook")
class PreHook(Hooked):
    def hooked(self) -> list[Any]:
        return [self.net[1].register_full_backward_pre_hook(tenth)]


@hooks("full backward hook")
class BackwardHook(Hooked):
    def hooked(self) -> list[Any]:
        return [self.net[1].register_full_backward_hook(tenth)]


@hooks("global backward hook")
class GlobalHook(Hooked):
    def hooked(self) -> list[Any]:
        def hook(module: Any, into: Any, out: Any) -> Any:
            return tenth(module, into) if module is self.net[1] else None

        return [nn.modules.module.register_module_full_backward_hook(hook)]


@hooks("of the graph's node")
class NodeHook(Hooked):
    def out(self, hidden: Tensor) -> Tensor:
        if hidden.grad_fn is not None:
            hidden.grad_fn.register_hook(tenth)
        return super().out(hidden)


@hooks("pre-hook of the graph's node")
class NodePreHook(Hooked):
    def out(self, hidden: Tensor) -> Tensor:
        if hidden.requires_grad:
            hidden.grad_fn.register_prehook(lambda out: tenth(None, out))
        return super().out(hidden)


@hooks("of tensors, in a forward hook")
class HookInHook(Hooked):
    def hooked(self) -> list[Any]:
        def hook(module: Any, into: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda grad: grad * 0.1)

        return [self.net[0].register_forward_hook(hook)]


@row("hooks", "forward hook that replaces the output")
class ForwardHook(Small):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].register_forward_hook(lambda module, into, out: out * self.p[0])


@row("hooks", "forward pre-hook")
class ForwardPreHook(Small):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].register_forward_pre_hook(lambda module, into: (into[0] * self.p[1],))


# ---------------------------------------------------------------------------------------------------------------------
# Randomness
# ---------------------------------------------------------------------------------------------------------------------


class Drawing(Small):
    """Draws masks; keeps what it drew, so that a plain loop can have the same."""

    given: list[Tensor] | None = None
    taken: list[Tensor] = []  # noqa: RUF012

    def uniform(self) -> Tensor:
        raise NotImplementedError

    def predicted(self, x: Tensor) -> Tensor:
        kind = type(self)
        mask = kind.given.pop(0) if kind.given is not None else (self.uniform() > 0.3).double() / 0.7
        kind.taken.append(mask)
        return self.net[2](self.net[1](self.net[0](x)) * mask)


class ByRandom(Drawing):
    def uniform(self) -> Tensor:
        return torch.tensor([random.random() for _ in range(4)])


class Transform:
    def __init__(self) -> None:
        self.source = random.Random(3)

    def __call__(self) -> Tensor:
        return torch.tensor([self.source.gauss(0, 1) for _ in range(4)])


class ByTransform(Drawing):
    def __init__(self) -> None:
        super().__init__()
        self.transforms = [Transform()]

    def uniform(self) -> Tensor:
        return self.transforms[0]()


class Masks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.source = torch.Generator().manual_seed(3)

    def forward(self) -> Tensor:
        return torch.rand(4, generator=self.source)


class BySubmodule(Drawing):
    def __init__(self) -> None:
        super().__init__()
        self.masks = Masks()

    def uniform(self) -> Tensor:
        return self.masks()


class Data:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)


class ByDataset(Drawing):
    def __init__(self) -> None:
        super().__init__()
        self.dataset = Data()

    def uniform(self) -> Tensor:
        return torch.as_tensor(self.dataset.rng.random(4))


class ByNumpyOfStart(Small):
    """Only the start draws."""

    def initial_inner_parameters(self) -> Any:
        return {"net.2.bias": torch.as_tensor(np.random.randn(1)) * self.p[0]}


class ByRandomRate(Small):
    """Only the optimizer draws."""

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1 + 0.2 * random.random())


class ByNumpyLate(Drawing):
    """Draws at the outer loss only when a flag says so; here at some inner batches."""

    def predicted(self, x: Tensor) -> Tensor:
        if len(x) == 4:
            return super().predicted(x)
        return self.net(x)

    def uniform(self) -> Tensor:
        return torch.as_tensor(np.random.rand(4))


def uneven(count: int) -> list[Episode]:
    from tests.support.kinds import batch

    return [Episode([batch(7, 5), batch(8, 4), batch(9, 4)], batch(10 + seed)) for seed in range(count)]


def states() -> Any:
    """Return the states of the generators of the process."""
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


DRAWING = {
    kind.__name__: kind
    for kind in (ByRandom, ByTransform, BySubmodule, ByDataset, ByNumpyOfStart, ByRandomRate, ByNumpyLate)
}


@pytest.mark.filterwarnings("ignore")  # the masks are drawn in float32, and seen there
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", DRAWING)
def test_what_is_drawn_is_drawn_again(name: str, count: int) -> None:
    chosen = uneven(count) if name == "ByNumpyLate" else episodes(count)
    found = {}
    for label, strategy in EVERY.items():
        module = DRAWING[name]()
        seeded()
        before = states()
        found[label] = flat(hypergradient(module, strategy(2), chosen, seed=1).grads)
        assert states() == before, f"{label} has drawn from the generators"
    for label, grads in found.items():
        tolerance = 1e-4 if label in DIFFERENCES else 1e-8
        torch.testing.assert_close(
            grads, found["reverse"], rtol=tolerance, atol=tolerance / 100, msg=lambda m, label=label: f"{label}: {m}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Inner optimizers that go over a whole task
# ---------------------------------------------------------------------------------------------------------------------


def of_lists(rule: Callable[..., list[Tensor]]) -> type[InnerOptimizer]:
    """Return the optimizer of a rule that is written for lists."""

    class Own(InnerOptimizer):
        def update(self, params: Any, grads: Any, opt_state: Any, step: int) -> Any:
            moved = rule(None, step, list(params.values()), list(grads.values()), {})
            return dict(zip(params, moved, strict=True)), {}

    return Own


def clipped(module: Any, step: int, theta: list[Tensor], grads: list[Tensor], memory: Any) -> list[Tensor]:
    norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    return [value - RATE * grad * (0.5 / norm).clamp(max=1) for value, grad in zip(theta, grads, strict=True)]


def trust(module: Any, step: int, theta: list[Tensor], grads: list[Tensor], memory: Any) -> list[Tensor]:
    return [value - 0.1 * value.norm() / (grad.norm() + 1e-3) * grad for value, grad in zip(theta, grads, strict=True)]


def centralized(module: Any, step: int, theta: list[Tensor], grads: list[Tensor], memory: Any) -> list[Tensor]:
    return [
        value - RATE * (grad - grad.mean(1, keepdim=True) if grad.ndim > 1 else grad)
        for value, grad in zip(theta, grads, strict=True)
    ]


def normalized(module: Any, step: int, theta: list[Tensor], grads: list[Tensor], memory: Any) -> list[Tensor]:
    return [value - 0.1 * grad / grad.abs().max() for value, grad in zip(theta, grads, strict=True)]


def with_rule(rule: Step, name: str) -> type[Small]:
    own = of_lists(rule)

    class Ruled(Small):
        def configure_inner_optimizer(self) -> Any:
            return own()

    Ruled.__name__ = name
    return Ruled


for label, rule in {
    "clipping by the global norm": clipped,
    "trust ratios": trust,
    "gradient centralization": centralized,
    "division by the largest entry": normalized,
}.items():
    ROWS.append(Row("whole tasks", label, with_rule(rule, label), rule))


class Centered(SGD):
    """Overrides the rule of an optimizer of this package."""

    def rule(self, values: Any, step: int) -> Any:
        move = super().rule(values, step)
        return lambda param, grad, state: move(param, grad - grad.mean(), state)


def centered(module: Any, step: int, theta: list[Tensor], grads: list[Tensor], memory: Any) -> list[Tensor]:
    return [value - RATE * (grad - grad.mean()) for value, grad in zip(theta, grads, strict=True)]


@row("whole tasks", "a subclass that overrides rule", centered)
class CenteredModule(Small):
    def configure_inner_optimizer(self) -> Any:
        return Centered(lr=RATE)


class ClippedAdam(Adam):
    """Calls the update of an optimizer of this package."""

    def update(self, params: Any, grads: Any, opt_state: Any, step: int) -> Any:
        norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
        return super().update(params, {k: v / (1 + norm) for k, v in grads.items()}, opt_state, step)


def clipped_adam(module: Any, step: int, theta: list[Tensor], grads: list[Tensor], memory: Any) -> list[Tensor]:
    norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    moved = []
    for number, (value, grad) in enumerate(zip(theta, grads, strict=True)):
        grad = grad / (1 + norm)
        first, second = memory.get(number, (0.0, 0.0))
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad.square()
        memory[number] = first, second
        moved.append(value - 0.05 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 0.1))
    return moved


@row("whole tasks", "a subclass that overrides update", clipped_adam)
class ClippedAdamModule(Small):
    def configure_inner_optimizer(self) -> Any:
        return ClippedAdam(lr=0.05, eps=0.1)


class Wrapped(InnerOptimizer):
    """Holds an elementwise optimizer, and normalizes what it gets."""

    def __init__(self, own: InnerOptimizer) -> None:
        self.own = own

    def init(self, params: Any) -> Any:
        return self.own.init(params)

    def update(self, params: Any, grads: Any, opt_state: Any, step: int) -> Any:
        norm = sum(grad.square().sum() for grad in grads.values()).sqrt()
        return self.own.update(params, {name: grad / norm for name, grad in grads.items()}, opt_state, step)


def of_unit_length(module: Any, step: int, theta: list[Tensor], grads: list[Tensor], memory: Any) -> list[Tensor]:
    norm = sum(grad.square().sum() for grad in grads).sqrt()
    return [value - RATE * grad / norm for value, grad in zip(theta, grads, strict=True)]


@row("whole tasks", "an optimizer around another", of_unit_length)
class WrappedModule(Small):
    def configure_inner_optimizer(self) -> Any:
        return Wrapped(SGD(lr=RATE))


@row("whole tasks", "a look ahead in the loss, in two steps")
class Sharpness(Small):
    """SAM in the loss: the loss at θ moved along its own gradient, with that gradient as a constant."""

    def inner_loss(self, batch: Any) -> Tensor:
        x, y = batch
        first, last = self.net[0].weight, self.net[2].weight

        def fit(u: Tensor, v: Tensor) -> Tensor:
            out = nn.functional.linear(nn.functional.linear(x, u, self.net[0].bias).tanh(), v, self.net[2].bias)
            return (out - y).square().mean() * self.p[0].exp()

        with torch.enable_grad():
            grads = torch.autograd.grad(fit(first, last), [first, last], create_graph=True)
        norm = sum(grad.square().sum() for grad in grads).sqrt()
        u, v = (w + 0.05 * g / norm for w, g in zip((first, last), grads, strict=True))
        return fit(u, v) + self.p[1].exp() * 0.1 * sum(value.square().sum() for value in self.net.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Buffers and attributes, which must not change the estimate, nor the module
# ---------------------------------------------------------------------------------------------------------------------


@row("left behind", "cumulative batch norm")
class Cumulative(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, momentum=None).double()

    def inner_parameters(self) -> Any:
        return self.net

    def predicted(self, x: Tensor) -> Tensor:
        return self.net[2](self.norm(self.net[1](self.net[0](x)))) if self.training else self.net(x)


@row("left behind", "a buffer that is not persistent", by=unrolled, strategies=EXACT)
class Fleeting(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, dtype=torch.float64), persistent=False)

    def predicted(self, x: Tensor) -> Tensor:
        y = self.net(x)
        self.mean = 0.5 * self.mean + 0.5 * y.detach().mean(0)
        return y - self.mean * self.p[0]


@row("left behind", "a counter that the loss reads")
class Counter(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def inner_loss(self, batch: Any) -> Tensor:
        self.count += 1
        return super().inner_loss(batch) / self.count


Pair = namedtuple("Pair", "first second")


@dataclass
class Record:
    value: Any = None


class Keeping(Small):
    """Stores what it computes in all kinds of attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.named = {"hidden": None}
        self.recent = deque(maxlen=2)
        self.nested = [[], {"deep": []}]
        self.record = Record()
        self.pair = Pair(torch.zeros(1), [])
        self.tuple = ()

    def predicted(self, x: Tensor) -> Tensor:
        y = self.net(x)
        self.named["hidden"] = y
        self.recent.append(y)
        self.nested[0].append(y)
        self.nested[1]["deep"].append(y)
        self.record.value = y
        self.pair = Pair(y, [y])
        self.tuple = (y, {"y": [y]})
        return y


ROWS.append(Row("left behind", "attributes of many kinds", Keeping))


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif hasattr(value, "__dataclass_fields__"):
        value = list(vars(value).values())
    return [one for each in value for one in tensors_in(each)] if isinstance(value, (list, tuple, deque)) else []


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("strategy", EVERY)
def test_attributes_are_put_back(strategy: str, count: int) -> None:
    module = Keeping()
    nested, record, pair = module.nested, module.record, module.pair
    hypergradient(module, EVERY[strategy](2), episodes(count))
    assert module.named == {"hidden": None}
    assert not module.recent
    assert module.nested is nested == [[], {"deep": []}]
    assert module.record is record == Record()
    assert module.pair is pair
    assert module.tuple == ()


@row("left behind", "a function with a cache")
class Cached(Small):
    @cache  # noqa: B019
    def grid(self, size: int) -> Tensor:
        return torch.linspace(0.5, 1.5, size, dtype=torch.float64)

    def predicted(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[1](self.net[0](x)) * self.grid(4))


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.abs()


@row("left behind", "cached parametrizations")
class Parametrized(Small):
    def __init__(self) -> None:
        super().__init__()
        parametrize.register_parametrization(self.net[0], "weight", Squared())

    def predicted(self, x: Tensor) -> Tensor:
        with parametrize.cached():
            return self.net(x) + self.net(-x)


# ---------------------------------------------------------------------------------------------------------------------
# What only some episodes use
# ---------------------------------------------------------------------------------------------------------------------


def by_domain(count: int) -> list[Episode]:
    return [
        Episode([(*one.inner[0], torch.tensor(number % 2))], one.outer) for number, one in enumerate(episodes(count))
    ]


@row("some episodes", "a penalty per domain, in a list", chosen=lambda count: by_domain(max(count, 2)))
class Domains(Small):
    def __init__(self) -> None:
        super().__init__()
        del self.p
        self.penalties = nn.ParameterList(nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.1, -0.4))

    def outer_parameters(self) -> Any:
        return self.penalties

    def inner_loss(self, batch: Any) -> Tensor:
        x, y, domain = batch
        size = sum(value.square().sum() for value in self.net.parameters())
        return (self.net(x) - y).square().mean() + self.penalties[int(domain)].exp() * 0.1 * size


@row("some episodes", "a mixture of experts", chosen=lambda count: by_domain(max(count, 2)))
class Experts(Small):
    def __init__(self) -> None:
        super().__init__()
        del self.p
        self.experts = nn.ModuleDict({name: nn.Linear(1, 1, bias=False).double() for name in ("0", "1")})
        with torch.no_grad():
            for number, expert in enumerate(self.experts.values()):
                expert.weight.fill_(number - 0.4)

    def outer_parameters(self) -> Any:
        return self.experts

    def inner_loss(self, batch: Any) -> Tensor:
        x, y, domain = batch
        return (self.experts[str(domain.item())](self.net(x)) - y).square().mean()


@row("some episodes", "no reader at all, allowed")
class Unused(Small):
    def __init__(self) -> None:
        super().__init__(allow_unused=True)
        self.q = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def inner_parameters(self) -> Any:
        return self.net

    def outer_parameters(self) -> Any:
        return [self.p, self.q]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that are not plain dense reals, and batches of other things
# ---------------------------------------------------------------------------------------------------------------------


@row("tensors", "complex weights")
class ComplexWeights(Small):
    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.tensor([0.5 + 1j, -0.3j, 1.0], dtype=torch.complex128))

    def inner_parameters(self) -> Any:
        return [self.z]

    def predicted(self, x: Tensor) -> Tensor:
        return (x.to(self.z) @ self.z).abs().square()[:, None]

    def inner_loss(self, batch: Any) -> Tensor:
        fit = (self.predicted(batch[0]) - batch[1]).square().mean() * 0.1 * self.p[0].exp()
        return fit + self.p[1].exp() * 0.1 * self.z.abs().square().sum()


def transformed(change: Callable[[Tensor], Any]) -> Callable[[int], list[Episode]]:
    return lambda count: [
        Episode([(change(e.inner[0][0]), e.inner[0][1])], (change(e.outer[0]), e.outer[1])) for e in episodes(count)
    ]


class Sparse(Small):
    def predicted(self, x: Tensor) -> Tensor:
        hidden = torch.sparse.mm(x, self.net[0].weight.T) + self.net[0].bias
        return self.net[2](self.net[1](hidden))


for label, change in {
    "COO": lambda x: (x * (x > 0)).to_sparse(),
    "CSR": lambda x: (x * (x > 0)).to_sparse_csr(),
    "CSC": lambda x: (x * (x > 0)).to_sparse_csc(),
}.items():
    ROWS.append(Row("batches", label, Sparse, strategies=WITHOUT_FORWARD_MODE, chosen=transformed(change)))


class Ragged(Small):
    def predicted(self, x: Any) -> Tensor:
        return torch.stack([self.net(part).mean(0) for part in x.unbind()])


for label, layout in {"nested": torch.strided, "jagged": torch.jagged}.items():
    ROWS.append(
        Row(
            "batches",
            label,
            Ragged,
            strategies=WITHOUT_FORWARD_MODE,
            chosen=transformed(
                lambda x, layout=layout: torch.nested.nested_tensor([x[i:5] for i in range(4)] + [x[:1]], layout=layout)
            ),
        )
    )


class Texts(Small):
    def predicted(self, x: Any) -> Tensor:
        lengths = torch.tensor([[len(word), word.count("a"), 1] for word in x["words"]], dtype=torch.float64)
        assert x["nothing"] is None
        return self.net(lengths + x["x"])


ROWS.append(
    Row(
        "batches",
        "strings and None",
        Texts,
        chosen=transformed(lambda x: {"words": ["a", "ba", "banana", "c", "dad"], "nothing": None, "x": x}),
    )
)


@dataclass
class Example:
    x: Tensor


class OfDataclass(Small):
    def predicted(self, x: Any) -> Tensor:
        return self.net(x.x)


ROWS.append(Row("batches", "a dataclass", OfDataclass, chosen=transformed(Example)))


# ---------------------------------------------------------------------------------------------------------------------
# Outer losses that take gradients, and selections
# ---------------------------------------------------------------------------------------------------------------------


@row("edges", "an outer loss by torch.autograd.grad")
class Smooth(Small):
    def outer_loss(self, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (into,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return super().outer_loss(batch) + into.square().mean()


@row("edges", "an outer loss by torch.func.grad")
class SmoothByFunc(Small):
    def outer_loss(self, batch: Any) -> Tensor:
        into = torch.func.grad(lambda x: self.net(x).sum())(batch[0])
        return super().outer_loss(batch) + into.square().mean()


@row("edges", "an outer loss of the inner loss's gradient")
class Matched(Small):
    def outer_loss(self, batch: Any) -> Tensor:
        grads = torch.autograd.grad(self.inner_loss(batch), list(self.net.parameters()), create_graph=True)
        return sum(grad.square().sum() for grad in grads)


@row("edges", "an inner loss by torch.func.jacrev")
class Contractive(Small):
    def inner_loss(self, batch: Any) -> Tensor:
        jacobian = torch.func.vmap(torch.func.jacrev(lambda x: self.net(x)))(batch[0])
        return super().inner_loss(batch) + self.p[0].exp() * 0.1 * jacobian.square().mean()


for label, select in {
    "Sequential": lambda module: nn.Sequential(module.head),
    "ModuleList": lambda module: nn.ModuleList([module.head]),
    "ModuleDict": lambda module: nn.ModuleDict({"head": module.head}),
    "a generator": lambda module: (parameter for parameter in module.head.parameters()),
    "named parameters' values": lambda module: dict(module.head.named_parameters()).values(),
    "a set": lambda module: set(module.head.parameters()),
}.items():

    class Selecting(Small):
        select = staticmethod(select)

        def __init__(self) -> None:
            super().__init__()
            del self.p
            self.head = nn.Linear(1, 1).double()
            with torch.no_grad():
                self.head.weight.fill_(0.7)
                self.head.bias.fill_(-0.2)

        def outer_parameters(self) -> Any:
            return self.select(self)

        def predicted(self, x: Tensor) -> Tensor:
            return self.head(self.net(x))

        def inner_loss(self, batch: Any) -> Tensor:
            return (self.predicted(batch[0]) - batch[1]).square().mean()

    ROWS.append(Row("selections", label, Selecting))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("member", ROWS, ids=lambda each: f"{each.kind}: {each.member}")
def test_right(member: Row, count: int) -> None:
    chosen = member.chosen(count)
    right = member.by(member.make, chosen, member.step)
    module = member.make()
    phi = nn.utils.parameters_to_vector(list(module.outer_parameters())).detach()
    value = looped(member.make, chosen, phi, member.step)
    wrong = []
    for label, strategy in member.strategies.items():
        seeded()
        try:
            found = hypergradient(member.make(), strategy(right.numel()), chosen)
        except Exception as error:
            wrong.append(f"{label}: {type(error).__name__}: {str(error)[:300]}")
            continue
        tolerance = 1e-4 if label in DIFFERENCES else 1e-6
        error = float((flat(found.grads) - right).norm() / right.norm())
        off = abs(found.value.item() - value)
        if error > tolerance or off > 1e-9:
            wrong.append(
                f"{label}: {error:.1e} off, its value {off:.1e}: {flat(found.grads).tolist()}, not {right.tolist()}"
            )
    assert not wrong, "\n".join(wrong)
