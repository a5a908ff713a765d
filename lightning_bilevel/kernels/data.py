"""``.data`` inside function transforms, where PyTorch refuses it or lets derivatives of other levels through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def data_in_transforms() -> Iterator[None]:
    """Let ``p.data`` be a detached ``p``, and ``p.data = x`` a copy of ``x`` into it, inside function transforms.

    PyTorch has neither under ``vmap`` and no assignment in the others, and what it returns there is a constant to the
    innermost of them only. Reverse mode takes it for a constant of all.

    >>> from torch.func import vmap
    >>> with data_in_transforms():
    ...     vmap(lambda x: x.data + 1)(torch.zeros(2))
    tensor([1., 1.])
    """
    native: Any = torch._C.TensorBase.data
    inside = torch._C._are_functorch_transforms_active

    def read(tensor: Tensor) -> Tensor:
        found: Tensor = tensor.detach() if inside() else native.__get__(tensor)
        return found

    def write(tensor: Tensor, value: Tensor) -> None:
        if inside():
            with torch.no_grad():
                tensor.copy_(value)
        else:
            native.__set__(tensor, value)

    before = vars(torch.Tensor).get("data")
    torch.Tensor.data = property(read, write)  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del torch.Tensor.data
        else:  # one estimate within another
            torch.Tensor.data = before
