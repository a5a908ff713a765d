"""Spectral norm whose vectors depend on the weight, as those of its power iteration do.

W / σ with σ = uᵀ W v. PyTorch iterates u and v without a graph: in its double backward they are constants, and a third
of a hypergradient can be missing, also where the iteration has converged, so that the first derivative is right.

The values, and the gradient that an inner optimizer steps along, stay PyTorch's to the bit; what follows from them has
u's and v's own derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm

from lightning_bilevel.kernels.inner_gradient import as_seen

PARAMETRIZATION: Any = parametrizations._SpectralNorm
OLD = SpectralNorm
NATIVE = PARAMETRIZATION.forward
NATIVE_OLD = OLD.compute_weight


def spectral_norm(self: Any, weight: Tensor) -> Tensor:
    """Stand in for ``forward`` of the parametrization."""
    if weight.ndim < 2 or not self.training or weight.is_complex():
        normalized: Tensor = NATIVE(self, weight)
        return normalized
    matrix = self._reshape_weight_to_matrix(weight)
    u, v = self._u.clone(), self._v.clone()
    for _ in range(self.n_power_iterations):
        u = F.normalize(torch.mv(matrix, v), dim=0, eps=self.eps)
        v = F.normalize(torch.mv(matrix.H, u), dim=0, eps=self.eps)
    _keep(self, _u=u, _v=v)
    return weight / torch.vdot(as_seen(u), torch.mv(matrix, as_seen(v)))


def old_spectral_norm(self: SpectralNorm, module: nn.Module, do_power_iteration: bool) -> Tensor:
    """Stand in for ``compute_weight`` of the hook that ``torch.nn.utils.spectral_norm`` adds."""
    weight: Tensor = getattr(module, f"{self.name}_orig")
    if not do_power_iteration or weight.is_complex():
        return NATIVE_OLD(self, module, do_power_iteration)
    matrix = self.reshape_weight_to_matrix(weight)
    u, v = (getattr(module, f"{self.name}_{letter}").clone() for letter in "uv")
    for _ in range(self.n_power_iterations):
        v = F.normalize(torch.mv(matrix.t(), u), dim=0, eps=self.eps)
        u = F.normalize(torch.mv(matrix, v), dim=0, eps=self.eps)
    _keep(module, **{f"{self.name}_u": u, f"{self.name}_v": v})
    return weight / torch.dot(as_seen(u), torch.mv(matrix, as_seen(v)))


def _keep(owner: nn.Module, **values: Tensor) -> None:
    """Leave values in buffers, which are constants to what comes after."""
    for name, value in values.items():
        if torch._C._are_functorch_transforms_active():  # a tensor from outside cannot be written to
            setattr(owner, name, value.detach())
        else:
            with torch.no_grad():
                getattr(owner, name).copy_(value)
