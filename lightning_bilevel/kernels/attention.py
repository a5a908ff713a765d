"""Attention in plain operations: PyTorch's fused kernels have neither a double backward nor forward AD."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_FUSED: list[tuple[Callable[[], bool], Callable[[bool], None]]] = [
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
]
"""Whether a kernel may be chosen, and what says so; they are of the process, and on a CPU they count as well."""


def fused() -> tuple[bool, ...]:
    """Return which of the fused kernels may be chosen now."""
    return tuple(enabled() for enabled, _ in _FUSED)


@contextmanager
def unfused() -> Iterator[None]:
    """Let ``scaled_dot_product_attention`` and the layers that use it choose plain operations.

    ``torch.nn.attention.sdpa_kernel`` does the same to the first in ten times the time, which every vectorized loss
    would pay.
    """
    before = [enabled() for enabled, _ in _FUSED]
    if not any(before):
        yield
        return
    try:
        for _, enable in _FUSED:
            enable(False)
        yield
    finally:
        for (_, enable), was in zip(_FUSED, before, strict=True):
            enable(was)
