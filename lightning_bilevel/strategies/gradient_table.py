"""A table of past gradients with a row for each mini-batch: what takes the noise of sampling out of a mean (SAGA)."""

from __future__ import annotations

import torch

from lightning_bilevel import tree
from lightning_bilevel.data.numbered import Place
from lightning_bilevel.errors import combination_error
from lightning_bilevel.tree import Params


class GradientTable:
    r"""Gradients of n mini-batches, as they were last seen; takes each as now − row_i + w_i · Σ_j row_j / Σ_j w_j.

    w_i is 0 before mini-batch i has been seen, so that its first gradient counts as it is, and 1 afterwards. For i
    drawn uniformly the corrections sum to zero whatever the rows and weights are: what is returned has the mean of
    ``now``, and where points rest, no noise. Processes with episodes of their own average what they carry: there, a row
    that one of them has seen weighs less than 1, and more with every visit.

    Memory: n rows for every name, all from the first step on. Cost of a step: one row, whatever n is.

    Args:
        kept: what :attr:`kept` was after the last step; it is not written to. Empty at first.

    Attributes:
        kept: the rows of every name, each by itself, so that a step copies one; their sum; their weights.

    >>> table = GradientTable({})
    >>> values = [(3.0, 0), (1.0, 1), (5.0, 0)]
    >>> [table.corrected("g", {"w": torch.tensor(value)}, Place(i, 2))["w"] for value, i in values]
    [tensor(3.), tensor(1.), tensor(4.)]
    """

    def __init__(self, kept: dict[str, Params]) -> None:
        self.kept = dict(kept)

    def corrected(self, name: str, now: Params, place: Place) -> Params:
        """Return the gradient with its noise taken out, and let it be the row of its mini-batch.

        Args:
            name: which gradient it is.
            now: of the mini-batch; kept in copies.
            place: (i, n).

        Raises:
            MisconfigurationError: the table that is carried has another number of rows.
        """
        row, total, weights = f"{name} {place.number}", f"{name} sum", f"{name} weights"
        if weights not in self.kept:
            self._begin(name, now, place.of)
        seen = self.kept[weights]["w"]
        if len(seen) != place.of:
            raise combination_error(
                f"a batch that is one of {place.of}",
                f"the table of past gradients that goes on has rows for {len(seen)}",
                "Number the batches as before, or begin a new fit",
            )
        change, share = tree.sub(now, self.kept[row]), seen[place.number] / seen.sum().clamp_min(1e-9)
        used = tree.add(change, self.kept[total], alpha=share)
        seen = seen.clone()
        seen[place.number] = 1
        self.kept |= {row: tree.map(torch.clone, now), total: tree.add(self.kept[total], change), weights: {"w": seen}}
        return used

    def _begin(self, name: str, like: Params, count: int) -> None:
        """Make all rows, so that all processes carry the same names."""
        self.kept |= {f"{name} {number}": tree.zeros_like(like) for number in range(count)}
        first = next(iter(like.values()))
        dtype = torch.promote_types(first.real.dtype, torch.float32)  # counts up to n
        weights = torch.zeros(count, dtype=dtype, device=first.device)
        self.kept |= {f"{name} sum": tree.zeros_like(like), f"{name} weights": {"w": weights}}
