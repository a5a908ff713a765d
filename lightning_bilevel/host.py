"""The one door to Lightning: every name this package takes from it, from one namespace.

Lightning ships twice, as ``pytorch_lightning`` and as ``lightning.pytorch``; their classes are
distinct. The package follows the one the project imported first.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or "lightning.pytorch" not in sys.modules:
    from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.utilities import move_data_to_device, rank_zero_warn
    from pytorch_lightning.utilities.combined_loader import CombinedLoader
else:
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
    from lightning.pytorch.utilities.combined_loader import CombinedLoader

__all__ = [
    "Callback",
    "CombinedLoader",
    "DistributedSamplerWrapper",
    "LightningModule",
    "Trainer",
    "move_data_to_device",
    "rank_zero_warn",
]
