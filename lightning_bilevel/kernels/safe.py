"""Surroundings in which a user's losses can be differentiated twice, and can be run again exactly.

PyTorch's fused attention has neither a double backward nor forward AD, the double backward of its
fused weight norm is wrong, cuDNN's RNNs have none, mkldnn's RNNs have no forward AD, and those of batch norm
and of convolutions are slow. The contexts below choose other kernels instead, only while a
hypergradient is computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_bilevel.kernels.batch_norm import batch_norm, instance_norm
from lightning_bilevel.kernels.convolution import conv1d, conv2d, conv3d
from lightning_bilevel.kernels.embedding import embedding
from lightning_bilevel.kernels.linear import linear

_GENERATOR = "_checkpoint_without_reentrant_generator"
"""What runs both passes of ``torch.utils.checkpoint``; from PyTorch 2.14 on, one of another name does."""
if hasattr(torch.utils.checkpoint, f"{_GENERATOR}_impl"):
    _GENERATOR += "_impl"


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return v · g / ‖v‖ in plain operations; the norm is taken over all dimensions but ``dim``."""
    norm = torch.linalg.vector_norm(v) if dim == -1 else torch.norm_except_dim(v, 2, dim)  # that has no jvp for -1
    return v * (g / norm)


_ALWAYS: list[tuple[Any, str, Any]] = [
    (torch, "_weight_norm", _weight_norm),
    (sys.modules["torch.nn.utils.weight_norm"], "_weight_norm", _weight_norm),  # the old style holds its own
    (torch, "embedding", embedding),
    (F, "linear", linear),
]
_TWICE: list[tuple[Any, str, Any]] = [
    (torch, "batch_norm", batch_norm),
    (torch, "instance_norm", instance_norm),
    (F, "conv1d", conv1d),
    (F, "conv2d", conv2d),
    (F, "conv3d", conv3d),
]
"""Owner, name, and what takes the place of its function: always, and where losses are differentiated twice."""


@contextmanager
def differentiable_kernels(module: nn.Module, twice: bool = True) -> Iterator[None]:
    """Use kernels with a correct double backward, and faster ones where there are.

    Args:
        module: decides whether cuDNN has to go (it does where there are RNNs).
        twice: whether losses are differentiated twice; a faster double backward makes a single one slower.
    """
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if torch.backends.cudnn.enabled and any(isinstance(child, nn.RNNBase) for child in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_attention)
        torch.backends.mha.set_fastpath_enabled(False)
        for owner, name, ours in (*_ALWAYS, *(_TWICE if twice else ())):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, ours)
        yield


@contextmanager
def recomputing_within(surroundings: Callable[[], Callable[[], AbstractContextManager[None]]]) -> Iterator[None]:
    """Let ``torch.utils.checkpoint`` in a user's net run its second forward pass within the surroundings of the first.

    That pass runs when a gradient is taken: by then the parameters that were swapped in are gone again, and it
    would silently compute with the module's own.

    Args:
        surroundings: called at the first pass; returns what makes its surroundings again.
    """
    generator = getattr(torch.utils.checkpoint, _GENERATOR)

    def within(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        again = surroundings()

        def recompute(*inputs: Any, **options: Any) -> Any:
            with again():
                return fn(*inputs, **options)

        return generator(recompute, *args, **kwargs)

    try:
        setattr(torch.utils.checkpoint, _GENERATOR, within)
        yield
    finally:
        setattr(torch.utils.checkpoint, _GENERATOR, generator)


@contextmanager
def forward_mode_kernels() -> Iterator[None]:
    """Use kernels with forward AD: mkldnn's and cuDNN's RNNs have none."""
    mkldnn = torch.backends.mkldnn.enabled
    with torch.backends.cudnn.flags(enabled=False):
        try:
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # its ``flags`` context warns about TF32
            yield
        finally:
            torch.backends.mkldnn.enabled = mkldnn


def generator_state(device: torch.device) -> Tensor | None:
    """Return the state of the generator of an accelerator; ``None`` on a CPU, and where there is none."""
    get = getattr(getattr(torch, device.type, None), "get_rng_state", None)
    return get(*_where(device)) if get is not None else None


def set_generator_state(device: torch.device, state: Tensor | None) -> None:
    """Put back what :func:`generator_state` returned, on a device of the same type."""
    if state is not None:
        getattr(torch, device.type).set_rng_state(state, *_where(device))


def _where(device: torch.device) -> tuple[torch.device, ...]:
    """Return how the functions for the generators of ``torch.cuda``, ``torch.xpu``, ``torch.mps`` name a device."""
    return () if device.type == "mps" else (device,)


class Randomness:
    """A snapshot of the global random generators, so that a run can be repeated with the same dropout masks.

    Args:
        device: the device of the run; its generator is kept as well as the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu, self._there = torch.get_rng_state(), generator_state(device)

    def untouched(self) -> bool:
        """Return whether nothing has been drawn since the snapshot was taken."""
        now = Randomness(self._device)
        same = torch.equal(self._cpu, now._cpu)
        return same and (self._there is None or now._there is None or torch.equal(self._there, now._there))

    def restore(self) -> None:
        """Put the generators back to where the snapshot was taken."""
        torch.set_rng_state(self._cpu)
        set_generator_state(self._device, self._there)

    @contextmanager
    def preserved(self, seed: int | None = None) -> Iterator[None]:
        """Restore the snapshot on exit: what runs inside leaves no trace in the generators.

        Args:
            seed: what runs inside starts from; ``None`` goes on from the present.
        """
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if self._there is not None:
                set_generator_state(self._device, torch.Generator(self._device).manual_seed(seed).get_state())
        try:
            yield
        finally:
            self.restore()
