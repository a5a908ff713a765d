"""Surroundings in which a user's losses can be differentiated twice.

PyTorch's fused attention has neither a double backward nor forward AD, those of its fused weight norm, of spectral
norm, of scaled embeddings and of chunked cross entropies are wrong, cuDNN's RNNs have none, mkldnn's RNNs have no
forward AD, and those of batch norm and of convolutions are slow. The contexts below choose other kernels instead, only
while a hypergradient is computed.
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

from lightning_bilevel.kernels.attention import fused, unfused
from lightning_bilevel.kernels.batch_norm import batch_norm, instance_norm
from lightning_bilevel.kernels.convolution import conv1d, conv2d, conv3d
from lightning_bilevel.kernels.embedding import embedding, embedding_bag, renormalize
from lightning_bilevel.kernels.linear import linear
from lightning_bilevel.kernels.linear_cross_entropy import NATIVE as CHUNKED
from lightning_bilevel.kernels.linear_cross_entropy import linear_cross_entropy
from lightning_bilevel.kernels.losses import OWNER as LOSSES
from lightning_bilevel.kernels.losses import hardsigmoid, huber_loss, mse_loss, soft_margin_loss
from lightning_bilevel.kernels.recurrent import gru, lstm, rnn_relu, rnn_tanh, without_mkldnn
from lightning_bilevel.kernels.spectral_norm import OLD, PARAMETRIZATION, old_spectral_norm, spectral_norm

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
    (torch, "embedding_bag", embedding_bag),
    (F, "_no_grad_embedding_renorm_", renormalize),
    (F, "linear", linear),
    (torch._VF, "lstm", lstm),
    (torch._VF, "gru", gru),
    (torch._VF, "rnn_tanh", rnn_tanh),
    (torch._VF, "rnn_relu", rnn_relu),
    (PARAMETRIZATION, "forward", spectral_norm),
    (OLD, "compute_weight", old_spectral_norm),
]
_TWICE: list[tuple[Any, str, Any]] = [
    (torch, "batch_norm", batch_norm),
    (torch, "instance_norm", instance_norm),
    (F, "conv1d", conv1d),
    (F, "conv2d", conv2d),
    (F, "conv3d", conv3d),
    (LOSSES, "hardsigmoid", hardsigmoid),
    *([] if CHUNKED is None else [(F, "linear_cross_entropy", linear_cross_entropy)]),
]
_FORWARD: list[tuple[Any, str, Any]] = [
    (LOSSES, "mse_loss", mse_loss),
    (LOSSES, "huber_loss", huber_loss),
    (LOSSES, "soft_margin_loss", soft_margin_loss),
]
"""Owner, name, and what takes the place of its function: always, where losses are differentiated twice, and forward."""


@contextmanager
def differentiable_kernels(module: nn.Module | None, twice: bool = True) -> Iterator[None]:
    """Use kernels with a correct double backward, and faster ones where there are.

    Args:
        module: decides whether cuDNN has to go (it does where there are RNNs); ``None`` is a problem without one.
        twice: whether losses are differentiated twice. Where they are not, attention may be fused, and what makes a
            double backward faster is left out, for it makes a single one slower.
    """
    with ExitStack() as stack:
        if twice:
            stack.enter_context(unfused())
        if torch.backends.cudnn.enabled and torch.cuda.is_available() and _is_recurrent(module):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        _replace(stack, [*_ALWAYS, *(_TWICE if twice else ())])
        yield


def _is_recurrent(module: nn.Module | None) -> bool:
    return module is not None and any(isinstance(child, nn.RNNBase) for child in module.modules())


def in_place() -> tuple[Any, ...]:
    """Return what stands in the places of the functions that these contexts replace, and what else they switch."""
    functions = [getattr(owner, name) for owner, name, _ in (*_ALWAYS, *_TWICE, *_FORWARD)]
    return *functions, torch.backends.mkldnn.enabled, *fused()


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
    """Use kernels with forward AD: mkldnn's and cuDNN's RNNs have none, nor have some losses."""
    with torch.backends.cudnn.flags(enabled=False), without_mkldnn(), ExitStack() as stack:
        _replace(stack, _FORWARD)
        yield


def _replace(stack: ExitStack, replacements: list[tuple[Any, str, Any]]) -> None:
    """Put functions in their places until the stack is left."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    stack.callback(_put, before)
    _put(replacements)


def _put(functions: list[tuple[Any, str, Any]]) -> None:
    for owner, name, function in functions:
        setattr(owner, name, function)
