"""The one door to Lightning: every name this package takes from it, from one namespace.

Lightning ships twice, as ``pytorch_lightning`` and as ``lightning.pytorch``; their classes are
distinct. The package follows the one the project imported first.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or "lightning.pytorch" not in sys.modules:
    from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
    from lightning_fabric.utilities.seed import _collect_rng_states, _set_rng_states, pl_worker_init_function
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.strategies import (
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        StrategyRegistry,
    )
    from pytorch_lightning.strategies.xla import XLAStrategy
    from pytorch_lightning.utilities import move_data_to_device, rank_zero_warn
    from pytorch_lightning.utilities.combined_loader import CombinedLoader
else:
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
    from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states, pl_worker_init_function
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import (
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        StrategyRegistry,
    )
    from lightning.pytorch.strategies.xla import XLAStrategy
    from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
    from lightning.pytorch.utilities.combined_loader import CombinedLoader

__all__ = [
    "Callback",
    "CombinedLoader",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "DistributedSamplerWrapper",
    "FSDPStrategy",
    "LightningModule",
    "ModelParallelStrategy",
    "StrategyRegistry",
    "Trainer",
    "XLAStrategy",
    "_collect_rng_states",
    "_set_rng_states",
    "move_data_to_device",
    "pl_worker_init_function",
    "rank_zero_warn",
]
