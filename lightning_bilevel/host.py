"""Re-exports Lightning's names from whichever of its two namespaces is imported; no other file imports Lightning.

Lightning ships twice, as ``pytorch_lightning`` and as ``lightning.pytorch``; their classes are
distinct. The package follows the one that was imported first; where none was, the one that is
installed, ``pytorch_lightning`` if both are. Sorted imports are in the right order: ``lightning`` comes before
``lightning_bilevel``, and ``pytorch_lightning`` after it.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_utilities.core.apply_func import apply_to_collection

_OLD, _NEW = "pytorch_lightning", "lightning.pytorch"
_LOADED = [name for name in sys.modules if name in (_OLD, _NEW)]  # in the order of the imports
NAMESPACE = _LOADED[0] if _LOADED else _OLD if find_spec(_OLD) else _NEW
OTHER = _NEW if NAMESPACE == _OLD else _OLD

if TYPE_CHECKING or NAMESPACE == "pytorch_lightning":
    from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
    from lightning_fabric.utilities.seed import _collect_rng_states, _set_rng_states, pl_worker_init_function
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
    from pytorch_lightning.strategies import (
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        StrategyRegistry,
    )
    from pytorch_lightning.strategies.xla import XLAStrategy
    from pytorch_lightning.trainer.connectors.data_connector import _process_dataloader, _resolve_overfit_batches
    from pytorch_lightning.trainer.states import RunningStage, TrainerFn
    from pytorch_lightning.utilities import move_data_to_device, rank_zero_info, rank_zero_warn
    from pytorch_lightning.utilities.combined_loader import CombinedLoader
    from pytorch_lightning.utilities.compile import to_uncompiled
    from pytorch_lightning.utilities.model_helpers import is_overridden
    from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
else:
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
    from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states, pl_worker_init_function
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.strategies import (
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        StrategyRegistry,
    )
    from lightning.pytorch.strategies.xla import XLAStrategy
    from lightning.pytorch.trainer.connectors.data_connector import _process_dataloader, _resolve_overfit_batches
    from lightning.pytorch.trainer.states import RunningStage, TrainerFn
    from lightning.pytorch.utilities import move_data_to_device, rank_zero_info, rank_zero_warn
    from lightning.pytorch.utilities.combined_loader import CombinedLoader
    from lightning.pytorch.utilities.compile import to_uncompiled
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

LIBRARIES = tuple(
    Path(str(sys.modules[kind.__module__.partition(".")[0]].__file__)).parent
    for kind in (Trainer, DistributedSamplerWrapper)
)
"""The folders of Lightning's own files."""

__all__ = [
    "Callback",
    "CombinedLoader",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "DistributedSamplerWrapper",
    "FSDPStrategy",
    "LIBRARIES",
    "LightningDataModule",
    "LightningModule",
    "ModelParallelStrategy",
    "NAMESPACE",
    "OTHER",
    "RunningStage",
    "StrategyRegistry",
    "Trainer",
    "TrainerFn",
    "XLAStrategy",
    "_collect_rng_states",
    "_process_dataloader",
    "_resolve_overfit_batches",
    "_set_rng_states",
    "apply_to_collection",
    "is_foreign",
    "is_overridden",
    "is_param_in_hook_signature",
    "mixing",
    "move_data_to_device",
    "notice_other_namespace",
    "pl_worker_init_function",
    "rank_zero_info",
    "rank_zero_warn",
    "to_uncompiled",
]


def is_foreign(thing: object) -> bool:
    """Return whether a class of the namespace that this package does not use is among those of ``thing``.

    >>> is_foreign(LightningModule())
    False
    """
    return any(kind.__module__.startswith(OTHER) for kind in type(thing).__mro__)


def mixing(what: str) -> tuple[str, str, str]:
    """Return the words of a combination error about the two namespaces.

    Args:
        what: what was tried, such as ``"`bilevel` with `Net`"``.
    """
    return (
        f"{what}, which is of `{OTHER}`",
        f"lightning_bilevel uses `{NAMESPACE}` here, and the classes of the two packages are distinct",
        f"Import `{OTHER}` before `lightning_bilevel` and before anything that imports `{NAMESPACE}`, or take "
        f"everything from `{NAMESPACE}`",
    )


def notice_other_namespace() -> None:
    """Warn if the other namespace was imported too, before or after this package; once.

    For where objects of the two meet, no code of ours may be reached: a Trainer does not tell more of a module that is
    not its own than that it wants a ``LightningModule``. So whatever is handed to a Trainer asks when it is made.
    """
    if OTHER in sys.modules:
        _warn_of_two_namespaces()


@cache
def _warn_of_two_namespaces() -> None:
    rank_zero_warn(
        f"`{NAMESPACE}` and `{OTHER}` are both imported, and their classes are distinct. lightning_bilevel uses "
        f"`{NAMESPACE}`: Trainers, modules and data modules have to come from there. If yours come from `{OTHER}`, "
        f"import it before `lightning_bilevel` and before anything that imports `{NAMESPACE}`."
    )
