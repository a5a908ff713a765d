"""Embeddings whose padding stays as it is under ``vmap``.

PyTorch makes one long table of all members' tables there, and leaves out the gradient of one row of the whole: with
several episodes, the padding of all but the first would be trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

NATIVE = torch.embedding


def embedding(
    weight: Tensor, input: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    """Return what ``torch.embedding`` returns, without a gradient of the row ``padding_idx`` of any member.

    Shapes, of one member: ``weight`` ``(rows, size)``, ``input`` ``(*)``.
    """
    if padding_idx < 0 or not torch._C._are_functorch_transforms_active():
        return NATIVE(weight, input, padding_idx, scale_grad_by_freq, sparse)
    found = NATIVE(weight, input, -1, scale_grad_by_freq, sparse)
    return torch.where((input == padding_idx).unsqueeze(-1), found.detach(), found)
