"""How many of the θ_t of an inner run are still held while it goes on."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

from lightning_bilevel import HypergradientStrategy, hypergradient
from tests.support.problems import Mlp, episodes


class Watched(Mlp):
    """Counts at every inner step how many of the first layer's weights so far are alive."""

    def inner_loss(self, batch: Any) -> Any:
        weight = self.net.first.weight
        if not any(seen() is weight for seen in self.watch.seen):
            self.watch.seen.append(weakref.ref(weight))
        self.watch.held.append(sum(seen() is not None for seen in self.watch.seen))
        return super().inner_loss(batch)


def most_held(strategy: HypergradientStrategy, steps: int) -> int:
    module = Watched("SGD", learned=False)
    # Not lists of the module's own: an estimate leaves these as they were.
    module.watch, module.inner_steps = SimpleNamespace(seen=[], held=[]), steps
    (episode,) = episodes(1)
    hypergradient(module, strategy, episode)
    return max(module.watch.held)
