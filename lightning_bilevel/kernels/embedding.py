"""Embeddings, alone and in bags, whose derivatives of all orders are right, also under ``vmap``.

What PyTorch's do otherwise:

- ``scale_grad_by_freq`` is forgotten in the double backward.
- Bags have no double backward and no forward AD. Their ``scale_grad_by_freq`` divides by the counts of other rows on a
  CPU, so that nothing could agree with a plain loop: refused.
- ``sparse`` gradients fit no inner optimizer. The dense ones here have the same values.
- Under ``vmap`` all members' tables become one, and ``padding_idx`` one row of the whole: with several episodes, the
  padding of all but the first would be trained.
- ``max_norm`` writes into the weight, which no derivative sees: refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_bilevel.errors import combination_error
from lightning_bilevel.kernels.inner_gradient import as_seen

NATIVE = torch.embedding
FUNCTIONAL: Any = torch.nn.functional
NATIVE_RENORM = FUNCTIONAL._no_grad_embedding_renorm_
SUM, MEAN, MAX = range(3)


def embedding(
    weight: Tensor, input: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    """Return what ``torch.embedding`` returns, without a gradient of the row ``padding_idx`` of any member.

    Shapes, of one member: ``weight`` ``(rows, size)``, ``input`` ``(*)``.
    """
    if padding_idx < 0 or not torch._C._are_functorch_transforms_active():
        found = NATIVE(weight, input, padding_idx)
    else:
        found = NATIVE(weight, input)
        found = torch.where((input == padding_idx).unsqueeze(-1), found.detach(), found)
    return as_seen(found, _shares(weight, input)) if scale_grad_by_freq else found


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what ``torch.embedding_bag`` returns, from plain lookups.

    Shapes, of one member: ``weight`` ``(rows, size)``, ``indices`` and ``per_sample_weights`` ``(entries,)``,
    ``offsets`` ``(bags,)``, or one more.

    Returns:
        The bags, ``(bags, size)``; the bag of each entry; the entries of each bag; and for the largest, which row of
        the weight each number is from.
    """
    if scale_grad_by_freq:
        raise combination_error(
            "`EmbeddingBag(scale_grad_by_freq=True)` in a loss",
            "PyTorch divides its gradient by the counts of other rows, on a CPU, and leaves them out of the second one",
            "Use `nn.Embedding(scale_grad_by_freq=True)` and take the sum or the mean of each bag",
        )
    bags = offsets[:-1] if include_last_offset else offsets
    found = embedding(weight, indices)
    counted = torch.ones_like(indices) if padding_idx is None else (indices != padding_idx).to(indices.dtype)
    starts = torch.zeros_like(torch.cat([indices, indices[:1]])).index_add(0, bags, torch.ones_like(bags))
    bag_of = starts[:-1].cumsum(0) - 1
    sizes = torch.zeros_like(bags).index_add(0, bag_of.to(bags.dtype), counted.to(bags.dtype))
    if mode == MAX:
        largest, rows = _largest(found, indices, bag_of, counted, sizes)
        return largest, bag_of, sizes, rows
    found = torch.where(counted.unsqueeze(-1) > 0, found, torch.zeros_like(found))
    if per_sample_weights is not None:
        found = found * per_sample_weights.unsqueeze(-1)
    sums = found.new_zeros(*bags.shape, found.shape[-1]).index_add(0, bag_of, found)
    means = sums / sizes.clamp(min=1).unsqueeze(-1) if mode == MEAN else sums
    return means, bag_of, sizes, sizes


def renormalize(weight: Tensor, input: Tensor, max_norm: float, norm_type: float) -> None:
    """Stand in for what cuts rows to ``max_norm``, in place; refuse a weight that is differentiated."""
    if weight.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(weight):
        raise combination_error(
            f"`Embedding(max_norm={max_norm})` in a loss, with a weight that is differentiated",
            "it writes into the weight whenever it is evaluated, and no derivative sees that",
            "Leave `max_norm` out and cut what is looked up: `rows * (max_norm / rows.norm(dim=-1, keepdim=True))"
            ".clamp(max=1)`",
        )
    NATIVE_RENORM(weight, input, max_norm, norm_type)


def _shares(weight: Tensor, input: Tensor) -> Tensor:
    """Return 1 / how often each index occurs, ``(*, 1)``."""
    flat = input.reshape(-1)
    counts = weight.new_zeros(weight.shape[0]).index_add(0, flat, torch.ones_like(flat, dtype=weight.dtype))
    return counts[flat].reciprocal().view(*input.shape, 1)


def _largest(found: Tensor, indices: Tensor, bag_of: Tensor, counted: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest numbers of each bag, zeros of an empty one, and the rows of the weight they are from.

    Of equal ones the first in the bag has the gradient, as PyTorch has it.
    """
    entries = len(indices)
    shape = (*sizes.shape, found.shape[-1])
    values = torch.where(counted.unsqueeze(-1) > 0, found.detach(), -torch.inf)
    where = bag_of.unsqueeze(-1).expand_as(values)
    most = values.new_full(shape, -torch.inf).scatter_reduce(0, where, values, "amax")
    numbers = torch.arange(entries, device=indices.device).unsqueeze(-1).expand_as(values)
    numbers = torch.where(values == most[bag_of], numbers, entries)
    first = torch.full_like(most, entries, dtype=numbers.dtype).scatter_reduce(0, where, numbers, "amin")
    first = torch.where((sizes > 0).unsqueeze(-1), first, entries)  # an empty bag is one row of zeros, at the end
    padded = torch.cat([found, torch.zeros_like(found[:1])])
    return padded.gather(0, first), torch.cat([indices, torch.zeros_like(indices[:1])])[first]
