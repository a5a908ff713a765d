"""The cross entropy of a linear layer, in one piece.

In chunks PyTorch makes its gradient in the forward pass, without a graph: the second derivative is zero without a word.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

NATIVE: Any = getattr(F, "linear_cross_entropy", None)
"""``None`` before PyTorch 2.13."""


def linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """Return what ``torch.nn.functional.linear_cross_entropy`` returns without ``options``, which ask for chunks."""
    loss: Tensor = NATIVE(*args, **kwargs)
    return loss
