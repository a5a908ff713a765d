"""Plain attributes that losses write: put back, or counted once, and alive."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn.utils import prune

from lightning_bilevel import (
    PZOBO,
    SGD,
    BilevelModule,
    Episode,
    GammaGreedy,
    ReverseUnroll,
    ZerothOrder,
    hypergradient,
)
from lightning_bilevel.modules.attributes import Attributes, once, plain
from tests.support.modules import listed, trainer


class Writing(BilevelModule):
    """Writes an attribute of every kind in both losses."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"inner_steps": 2, "inner_start": "reset", **options})
        self.net, self.p = nn.Linear(3, 2), nn.Parameter(torch.zeros(()))
        self.losses, self.last, self.count, self.named, self.few, self.of_inner = [], None, 0, {}, deque(maxlen=2), None

    def inner_parameters(self):
        return self.net

    def inner_loss(self, x):
        loss = self.written(x).square().mean() * self.p.exp()
        self.of_inner = loss
        return loss

    def outer_loss(self, x):
        return (self.written(x) - 1).square().mean()

    def written(self, x):
        y = self.net(x)
        self.last, self.net.inside = y, y * 2
        self.losses.append(y.sum())
        self.few.append(y)
        self.named["y"] = y
        self.count += 1
        return y

    def configure_inner_optimizer(self):
        return SGD(lr=0.1)

    def configure_optimizers(self):
        return torch.optim.SGD([self.p], lr=0.1)


STRATEGIES = {"reverse": ReverseUnroll(), "PZOBO": PZOBO(2, mu=1e-2), "zeroth order": ZerothOrder(2, mu=1e-2)}
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("episodes", [1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_an_estimate_leaves_them_as_they_were(strategy, episodes):
    module = Writing()
    module.losses.append("before")
    hypergradient(module, strategy, [Episode([X], X)] * episodes)
    assert (module.losses, module.last, module.count, module.named) == (["before"], None, 0, {})
    assert list(module.few) == []
    assert not hasattr(module.net, "inside")
    copy.deepcopy(module)


@pytest.mark.parametrize("episodes", [1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_fit_writes_them_once_a_step_and_alive(strategy, episodes):
    module, losses = Writing(), []
    trainer(strategy, max_epochs=1).fit(module, listed([[Episode([X], X)] * episodes] * 3))
    losses = module.losses
    assert (len(losses), module.count, len(module.few)) == (3, 3, 2)
    for value in (*losses, *module.few, module.last, module.named["y"], module.net.inside, module.of_inner):
        assert torch.isfinite(value + 0).all()
        assert not value.requires_grad
    assert module.last.shape[-2:] == (5, 2)
    copy.deepcopy(module)


def test_what_an_error_leaves_behind_goes():
    class Failing(Writing):
        def outer_loss(self, x):
            super().outer_loss(x)
            raise RuntimeError("no")

    module = Failing()
    with pytest.raises(RuntimeError, match=r"^no\n"):
        hypergradient(module, ReverseUnroll(), Episode([X], X))
    assert (module.losses, module.count) == ([], 0)


def test_pruned_layers_can_be_read_and_copied():
    module = Writing()
    module.net = prune.random_unstructured(module.net, "weight", amount=0.5)
    before = module.net.weight.clone()
    hypergradient(module, ReverseUnroll(), [Episode([X], X)] * 3)
    torch.testing.assert_close(module.net.weight, before)
    copy.deepcopy(module.net.weight.detach())


def test_once_counts_from_the_start():
    module = nn.Module()
    module.seen, module.number, module.word = [1], 10, "a"
    attributes = Attributes(module)
    start = attributes.take()
    module.seen.extend([2, 3])
    module.number, module.word = 12, "b"
    before = attributes.take()
    module.seen.append(4)
    module.number, module.new = 13, "c"
    attributes.put(once(start, before, attributes.take()))
    assert (module.seen, module.number, module.word, module.new) == ([1, 4], 11, "b", "c")
    attributes.put(start)
    assert (module.seen, module.number, module.word, hasattr(module, "new")) == ([1], 10, "a", False)


def test_tensors_are_taken_out_of_transforms():
    kept = []

    def fn(x):
        kept.append(2 * x)
        return x.sum()

    vmap(fn)(torch.ones(3, 2))
    assert torch.equal(plain(kept[0]), torch.full((3, 2), 2.0))
    leaf = torch.ones(2, requires_grad=True)
    assert not plain(leaf * 2).requires_grad
    assert plain("text") == "text"


def test_other_containers_are_written_once_a_step():
    class More(Writing):
        def __init__(self):
            super().__init__()
            self.counter, self.by_name, self.ordered = Counter(), defaultdict(list), OrderedDict()
            self.wrapped, self.listed = UserDict(), UserList()

        def written(self, x):
            y = super().written(x)
            self.counter["seen"] += 1
            self.by_name["y"].append(y)
            self.ordered[len(self.ordered)] = y
            self.wrapped[len(self.wrapped)] = y
            self.listed.append(y.sum())
            return y

    module = More()
    hypergradient(module, ReverseUnroll(), Episode([X], X))
    assert not any(map(len, (module.counter, module.by_name, module.ordered, module.wrapped, module.listed)))


def test_plain_tensors_written_in_place_are_named():
    class Averaging(Writing):
        def __init__(self):
            super().__init__()
            self.average = torch.zeros(())

        def written(self, x):
            y = super().written(x)
            self.average.mul_(0.9).add_(y.detach().sum(), alpha=0.1)
            return y

    with pytest.warns(UserWarning, match=r"^The losses write to `average` in place, a plain tensor"):
        hypergradient(Averaging(), ReverseUnroll(), Episode([X], X))


@pytest.mark.parametrize("strategy", [ReverseUnroll(), GammaGreedy(), ZerothOrder()])
def test_what_losses_write_is_let_go_with_the_estimate(strategy: Any):
    class Watched(Writing):
        def written(self, x):
            y = super().written(x)
            written.append(weakref.ref(y))
            return y

    written: list[Any] = []
    module = Watched()
    hypergradient(module, strategy, Episode([X], X))
    gc.collect()
    assert written
    assert not any(ref() is not None for ref in written)


def test_what_was_taken_before_is_taken_anew_where_it_has_changed():
    module = nn.Sequential(nn.ReLU())
    module.words, module.listed, module.pair, module.average = "a", [1], ([],), torch.zeros(1)
    attributes = Attributes(module)
    start = attributes.take()
    assert attributes.take() == start
    module.other = module.__dict__.pop("words")
    module.listed.append(2)
    module.pair[0].append(3)
    module.average += 1
    module[0].inplace = True
    now, first = attributes.take(), start[0]
    assert "words" not in now[0]
    assert now[0]["other"].value == "a"
    assert not now[0]["listed"].same(first["listed"])
    assert not now[0]["pair"].same(first["pair"])
    assert now[0]["average"].version > first["average"].version
    assert now[1]["inplace"].value is True
    assert attributes.put(start)
    assert (module.words, module.listed, module.pair, module[0].inplace) == ("a", [1], ([],), False)
    module.append(nn.Tanh())
    attributes.look()
    assert len(attributes.take()) == 3
