"""Safe kernels are chosen while a hypergradient is computed, and put back; threads take turns; masks are replayed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bilevel import HypergradientStrategy, ReverseUnroll, hypergradient
from lightning_bilevel.kernels.safe import differentiable_kernels, forward_mode_kernels, in_place
from lightning_bilevel.randomness import RngState
from tests.support.nets import STRATEGIES, Weighted, data
from tests.support.problems import assert_close


def kernels() -> dict[str, Any]:
    return {
        "fast attention": torch.backends.mha.get_fastpath_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "cudnn": torch.backends.cudnn.enabled,
        "weight norm": torch._weight_norm,
        "batch norm": torch.batch_norm,
        "instance norm": torch.instance_norm,
        "linear": torch.nn.functional.linear,
        "convolutions": [getattr(torch.nn.functional, f"conv{d}d") for d in (1, 2, 3)],
    }


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_kernels_are_put_back(strategy: HypergradientStrategy) -> None:
    class Spy(Weighted):
        seen: dict[str, Any] = {}  # noqa: RUF012

        def outer_loss(self, batch):
            self.seen.update(kernels())
            if self.net[0].weight.isnan().any():
                raise ArithmeticError("nan")
            return super().outer_loss(batch)

    before, module, episode = kernels(), Spy("weight_norm"), data("weight_norm")
    hypergradient(module, strategy, episode)
    assert kernels() == before
    for kind in ("flash", "fast attention"):
        assert module.seen[kind] == (not strategy.second_order)
    # Where losses are differentiated once, PyTorch's own take less time.
    for kind in ("batch norm", "convolutions"):
        assert (module.seen[kind] != before[kind]) == strategy.second_order
    module = Spy("weight_norm")  # of which nothing is known: the first look meets it
    with torch.no_grad():
        module.net[0].weight.fill_(torch.nan)
    with pytest.raises(ArithmeticError, match="^nan"):
        hypergradient(module, strategy, episode)
    assert kernels() == before


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_generators_of_accelerators(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are drawn on the device: what runs again needs its generator, too; the one of Apple's has no index."""
    device, there = torch.device(kind), torch.Generator()
    expected = () if kind == "mps" else (device,)

    def get(*where: torch.device) -> Tensor:
        assert where == expected
        return there.get_state()

    def put(state: Tensor, *where: torch.device) -> None:
        assert where == expected
        there.set_state(state)

    monkeypatch.setattr(getattr(torch, kind), "get_rng_state", get)
    monkeypatch.setattr(getattr(torch, kind), "set_rng_state", put)
    randomness = RngState(device)
    with randomness.fork():
        first = torch.rand(3, generator=there)
    again = torch.rand(3, generator=there)
    randomness.restore()
    assert torch.equal(first, again)
    assert torch.equal(first, torch.rand(3, generator=there))


def test_threads_take_turns() -> None:
    """Kernels and random generators are those of the process, so that two estimates at once would spoil each other."""
    episode, results = data("weight_norm"), []

    def estimated() -> None:
        results.append(hypergradient(Weighted("weight_norm"), ReverseUnroll(), episode).grads)

    others: list[threading.Thread] = []

    class Impatient(Weighted):
        def outer_loss(self, batch):
            if not others:
                others.append(threading.Thread(target=estimated))
                others[0].start()
                others[0].join(timeout=1.0)
                assert not results
            return super().outer_loss(batch)

    module = Impatient("weight_norm")
    mine = hypergradient(module, ReverseUnroll(), episode).grads
    others[0].join()
    assert_close(results[0], mine, 0)


def test_what_is_in_place_tells_the_contexts_apart() -> None:
    found = [in_place()]
    for context in (differentiable_kernels(None), differentiable_kernels(None, twice=False), forward_mode_kernels()):
        with context:
            found.append(in_place())
    assert len(set(found)) == 4
    assert in_place() == found[0]
