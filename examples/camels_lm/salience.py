"""Weights of tokens without training: how rare a token is among documents, and how frequent in the one at hand.

>>> Salience([[1, 2], [1, 3], [1, 3]], vocabulary=4, counted=False).by_token
tensor([6.5571, 0.0000, 3.2786, 1.3607])
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from camels_lm.encoding import Tokens


class Salience(nn.Module):
    """TF-IDF weights, with mean 1 over the tokens of the documents that the frequencies are from.

    The weight of token w is log((1 + N) / (1 + N_w)), N_w of N documents having it, times its count in the passage if
    that is wanted. Salton and Buckley (Information Processing & Management, 1988).

    Args:
        documents: token ids of each.
        vocabulary: tokens there are.
        counted: times the count (TF-IDF), or not (IDF).
    """

    def __init__(self, documents: Iterable[Sequence[int]], vocabulary: int, counted: bool) -> None:
        super().__init__()
        self.counted = counted
        documents = [torch.tensor(document) for document in documents]
        having = torch.stack([torch.bincount(document.unique(), minlength=vocabulary) for document in documents]).sum(0)
        self.register_buffer("by_token", ((1 + len(documents)) / (1 + having)).log())
        weights = torch.cat([self._raw(document[None], torch.ones(1, len(document)))[0] for document in documents])
        self.by_token /= weights.mean()

    def forward(self, passage: Tokens) -> Tensor:
        """Return the weights, shape ``(rows, length)``."""
        return self._raw(passage.ids, passage.present)

    def _raw(self, ids: Tensor, present: Tensor) -> Tensor:
        weights = self.by_token[ids]
        if not self.counted:
            return weights
        same = ids[:, :, None] == ids[:, None]
        return weights * (same * present[:, None]).sum(-1)
