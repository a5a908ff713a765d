"""Parameters that a loss moves, as momentum encoders do: state, which goes along with the inner run like buffers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_bilevel import (
    PZOBO,
    SGD,
    BilevelModule,
    Episode,
    ForwardUnroll,
    ImplicitGradient,
    ReverseUnroll,
    audit,
    hypergradient,
)
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Dense
from lightning_bilevel.modules.written import Written
from tests.support.modules import differing, listed, parameters, trainer

generator = torch.Generator().manual_seed(0)
X = [torch.randn(8, 3, generator=generator, dtype=torch.float64) for _ in range(6)]
EPISODES = [Episode(X[:2], X[2]), Episode(X[2:4], X[4]), Episode(X[3:5], X[5])]


class Follower(BilevelModule):
    """A net with a copy of its body that follows the body and the head; ``move`` moves the copy."""

    def __init__(self, move: Callable[..., None], **options: Any) -> None:
        super().__init__(inner_steps=2, inner_start="reset", **options)
        generator = torch.Generator().manual_seed(1)
        self.body, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 4).double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        self.copy, self.slow = copy.deepcopy(self.body).requires_grad_(False), None
        nn.init.zeros_(self.copy.weight)
        self.move, self.when = move, 0

    def inner_parameters(self) -> Any:
        return self.head

    def outer_parameters(self) -> Any:
        return self.body

    def inner_loss(self, x: Tensor) -> Tensor:
        self.move(self)
        out = self.body(x).tanh()
        return (self.head(out) - self.copy(x).tanh()).square().mean() + 0.1 * out.square().mean()

    outer_loss = inner_loss

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.body.parameters(), lr=0.1)


def pairs(module: Any) -> Any:
    return list(zip(module.copy.parameters(), module.body.parameters(), strict=True))


def assigned(module: Any) -> None:
    for slow, fast in pairs(module):
        slow.data = slow.data * 0.9 + fast.data * 0.1


def of_data(module: Any) -> None:
    for slow, fast in pairs(module):
        slow.data.mul_(0.9).add_(fast.data, alpha=0.1)


@torch.no_grad()
def in_place(module: Any) -> None:
    for slow, fast in pairs(module):
        slow.mul_(0.9).add_(fast, alpha=0.1)


@torch.no_grad()
def mixed(module: Any) -> None:
    for slow, fast in pairs(module):
        slow.lerp_(fast, 0.1)


@torch.no_grad()
def of_lists(module: Any) -> None:
    slow, fast = zip(*pairs(module), strict=True)
    torch._foreach_mul_(slow, 0.9)
    torch._foreach_add_(slow, fast, alpha=0.1)


@torch.no_grad()
def copied(module: Any) -> None:
    for slow, fast in pairs(module):
        slow.copy_(0.9 * slow + 0.1 * fast)


@torch.no_grad()
def loaded(module: Any) -> None:
    fast = module.body.state_dict()
    module.copy.load_state_dict({name: 0.9 * v + 0.1 * fast[name] for name, v in module.copy.state_dict().items()})


@torch.no_grad()
def replaced(module: Any) -> None:
    for name in ("weight", "bias"):
        slow, fast = getattr(module.copy, name), getattr(module.body, name)
        setattr(module.copy, name, nn.Parameter(0.9 * slow + 0.1 * fast, requires_grad=False))


MOVES = {each.__name__: each for each in (assigned, of_data, in_place, mixed, of_lists, copied, loaded)}


def in_buffers(move: Callable[..., None] = in_place, **options: Any) -> Follower:
    """Return the same module with buffers in the place of the copy's parameters."""
    module = Follower(move, **options)
    for name, value in list(module.copy.named_parameters()):
        del module.copy._parameters[name]
        module.copy.register_buffer(name, value.detach())
    module.move = in_place_of_buffers
    return module


@torch.no_grad()
def in_place_of_buffers(module: Any) -> None:
    for slow, fast in zip(module.copy.buffers(), module.body.parameters(), strict=True):
        slow.mul_(0.9).add_(fast, alpha=0.1)


STRATEGIES: dict[str, Callable[[], Any]] = {
    "reverse": ReverseUnroll,
    "recomputed": lambda: ReverseUnroll(checkpoint="sqrt"),
    "forward": lambda: ForwardUnroll(mode="forward"),
    "implicit": lambda: ImplicitGradient(Dense()),
    "PZOBO": lambda: PZOBO(num_directions=2, mu=0.1),
}


@pytest.mark.parametrize("episodes", [1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_parameter_that_a_loss_moves_goes_along_like_a_buffer(move, strategy, episodes):
    module, right = Follower(move), in_buffers()
    before = parameters(module)
    if move in (mixed, of_lists):
        warnings.simplefilter("ignore")  # `vmap` has no rule for these: they are looped over, or slow
    found, again = (hypergradient(module, strategy(), EPISODES[:episodes]) for _ in range(2))
    expected = hypergradient(right, strategy(), EPISODES[:episodes])
    torch.testing.assert_close(found.value, expected.value)
    torch.testing.assert_close(found.grads, expected.grads)
    torch.testing.assert_close(again.grads, found.grads)
    assert differing(before, parameters(module)) == []


@pytest.mark.parametrize("strategy", [ReverseUnroll, lambda: PZOBO(num_directions=2)], ids=["reverse", "PZOBO"])
@pytest.mark.parametrize("move", [assigned, in_place, replaced])
def test_a_fit_moves_it_as_it_does_a_buffer(move, strategy):
    module, right = Follower(move), in_buffers()
    for each in (module, right):
        trainer(strategy(), max_epochs=1).fit(each, listed([EPISODES[:1]] * 3))
    for name, value in right.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)
    assert isinstance(module.copy.weight, nn.Parameter)


def test_an_average_of_pytorch_goes_along():
    class Averaged(Follower):
        """Its first average is a copy, which ``vmap`` cannot decide for each episode."""

        def __init__(self) -> None:
            super().__init__(lambda module: module.copy.update_parameters(module.body))
            self.copy = AveragedModel(self.body, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            self.copy.requires_grad_(False)

    def by_hand(module: Any) -> None:
        share = 1.0 if module.first == 0 else 0.1
        for slow, fast in zip([module.weight, module.bias], module.body.parameters(), strict=True):
            slow.lerp_(fast.detach(), share)
        module.first += 1

    class ByHand(Follower):
        def __init__(self) -> None:
            super().__init__(by_hand)
            del self.copy
            self.copy = lambda x: nn.functional.linear(x, self.weight, self.bias)
            for name in ("weight", "bias"):
                self.register_buffer(name, getattr(self.body, name).detach().clone())
            self.register_buffer("first", torch.tensor(0))

    module, right = Averaged(), ByHand()
    for each in (module, right):
        trainer(ReverseUnroll(), max_epochs=1).fit(each, listed([EPISODES[:1]] * 2))
    torch.testing.assert_close(module.copy.module.weight.data, right.weight)
    torch.testing.assert_close(module.body.weight, right.body.weight)
    assert module.copy.n_averaged == right.first == 6


@torch.no_grad()
def clamped(module: Any) -> None:
    module.head.weight.clamp_(-0.1, 0.1)


def clamped_data(module: Any) -> None:
    module.body.weight.data.clamp_(-0.1, 0.1)


def assigned_data(module: Any) -> None:
    module.head.weight.data = module.head.weight.data * 0.5


@pytest.mark.parametrize(
    ("move", "name"), [(clamped, "head.weight"), (clamped_data, "body.weight"), (assigned_data, "head.weight")]
)
def test_a_loss_that_writes_to_a_level_is_refused_and_nothing_has_moved(move, name):
    module = Follower(move)
    before = parameters(module)
    with pytest.raises(MisconfigurationError, match=rf"^Cannot use a loss of `Follower` that writes to {name}\."):
        hypergradient(module, ReverseUnroll(), EPISODES[0])
    assert differing(before, parameters(module)) == []


def test_what_is_written_at_times_only_is_named():
    def at_times(module: Any) -> None:
        module.when += 1
        if module.when > 3:
            in_place(module)

    with pytest.raises(MisconfigurationError, match=r"writes to copy\.weight, copy\.bias at times only"):
        hypergradient(Follower(at_times), ReverseUnroll(), EPISODES[0])


def test_an_error_in_a_loss_leaves_it_as_it_was():
    def failing(module: Any) -> None:
        in_place(module)
        raise RuntimeError("no")

    module = Follower(failing)
    before = parameters(module)
    with pytest.raises(RuntimeError, match="^no\n"):
        hypergradient(module, ReverseUnroll(), EPISODES[0])
    assert differing(before, parameters(module)) == []


@pytest.mark.parametrize("move", [assigned, in_place])
def test_an_audit_leaves_it_as_it_was(move):
    module = Follower(move)
    before = parameters(module)
    audit(module, EPISODES[0], verbose=False)
    assert differing(before, parameters(module)) == []


def test_what_an_operation_writes_to_is_seen_and_undone():
    tensors = {name: torch.ones(2) for name in ("list", "out", "view", "assigned", "read")}
    with Written(tensors) as written:
        torch._foreach_add_([tensors["list"]], 1)
        torch.add(torch.ones(2), 1, out=tensors["out"])
        tensors["view"].detach()[:1].zero_()
        tensors["assigned"].data = torch.zeros(2)
        _ = tensors["read"] * 2
    assert written.names() == ["list", "out", "view", "assigned"]
    written.undo()
    for name in ("list", "out", "view"):
        assert torch.equal(tensors[name], torch.ones(2))
