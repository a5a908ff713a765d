"""Inventories for links to torch and Lightning, made from the names below: a build asks the network for nothing.

Intersphinx reads where a name is documented from a file that a project publishes. Names that are not here stay text.
"""

from __future__ import annotations

import zlib
from pathlib import Path

TORCH = "https://docs.pytorch.org/docs/stable/"
LIGHTNING = "https://lightning.ai/docs/pytorch/stable/"


def own_page(*names: str, folder: str) -> dict[str, str]:
    """Return the addresses of names that have a page each."""
    return {name: f"{folder}/{name}.html#{name}" for name in names}


def also(known: str, address: str, *names: str) -> dict[str, str]:
    """Return one address for other names of the same thing: those that objects say of themselves."""
    return dict.fromkeys((known, *names), address)


MODULE = "api/lightning.pytorch.core.LightningModule.html#lightning.pytorch.core.LightningModule"
TRAINER = "api/lightning.pytorch.trainer.trainer.Trainer.html#lightning.pytorch.trainer.trainer.Trainer"
CALLBACK = (
    "api/lightning.pytorch.callbacks.Callback.html#lightning.pytorch.callbacks.Callback"
)
DDP = "api/lightning.pytorch.strategies.DDPStrategy.html#lightning.pytorch.strategies.DDPStrategy"
NAMES = {
    "torch": {
        "torch.Tensor": "tensors.html#torch.Tensor",
        "Tensor": "tensors.html#torch.Tensor",
        "torch.device": "tensor_attributes.html#torch.device",
        "torch.dtype": "tensor_attributes.html#torch.dtype",
        "torch.utils.data.DataLoader": "data.html#torch.utils.data.DataLoader",
        "torch.utils.data.Dataset": "data.html#torch.utils.data.Dataset",
        "torch.utils.data.IterableDataset": "data.html#torch.utils.data.IterableDataset",
        "torch.optim.Optimizer": "optim.html#torch.optim.Optimizer",
        "torch.optim.optimizer.Optimizer": "optim.html#torch.optim.Optimizer",
        **also(
            "torch.nn.Parameter",
            "generated/torch.nn.parameter.Parameter.html#torch.nn.parameter.Parameter",
            "torch.nn.parameter.Parameter",
        ),
        **also(
            "torch.nn.Module",
            "generated/torch.nn.Module.html#torch.nn.Module",
            "torch.nn.modules.module.Module",
            "nn.Module",
        ),
        **own_page(
            "torch.Generator",
            "torch.func.functional_call",
            "torch.vmap",
            folder="generated",
        ),
        **own_page(
            *(
                f"torch.optim.{name}"
                for name in (
                    "Adadelta",
                    "Adagrad",
                    "Adam",
                    "AdamW",
                    "Adamax",
                    "NAdam",
                    "RAdam",
                    "RMSprop",
                    "SGD",
                )
            ),
            folder="generated",
        ),
    },
    "lightning": {
        **also(
            "pytorch_lightning.LightningModule",
            MODULE,
            "pytorch_lightning.core.module.LightningModule",
        ),
        **also(
            "pytorch_lightning.Trainer",
            TRAINER,
            "pytorch_lightning.trainer.trainer.Trainer",
        ),
        **also(
            "pytorch_lightning.Callback",
            CALLBACK,
            "pytorch_lightning.callbacks.callback.Callback",
        ),
        **also(
            "pytorch_lightning.strategies.DDPStrategy",
            DDP,
            "pytorch_lightning.strategies.ddp.DDPStrategy",
        ),
    },
}
ADDRESSES = {"torch": TORCH, "lightning": LIGHTNING}


def write_all(folder: Path) -> dict[str, tuple[str, str]]:
    """Write ``NAME.inv`` for each project, in the format of Sphinx; return what ``intersphinx_mapping`` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    for project, names in NAMES.items():
        head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n# It is compressed using zlib.\n"
        lines = (
            f"{name} py:class 1 {address} -\n"
            for name, address in sorted(names.items())
        )
        (folder / f"{project}.inv").write_bytes(
            head.encode() + zlib.compress("".join(lines).encode())
        )
    return {
        name: (address, str(folder / f"{name}.inv"))
        for name, address in ADDRESSES.items()
    }
