"""The device of ``simulated_device.cpp`` as ``torch.device("simulated")``, and an accelerator of Lightning for it."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.cpp_extension import load

NAME = "simulated"


def register(folder: Path) -> None:
    """Compile the device into ``folder`` and let torch know it, for the rest of the process."""
    source = Path(__file__).with_suffix(".cpp")
    library = load("simulated_device", [str(source)], build_directory=str(folder), extra_cflags=["-O1"])
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module(library.default_generator()))
    nn.Parameter.__deepcopy__ = _copied(nn.Parameter.__deepcopy__)  # type: ignore[method-assign]
    Tensor.__deepcopy__ = _copied(Tensor.__deepcopy__)  # type: ignore[method-assign]
    torch.UntypedStorage.cpu = _on_the_host(torch.UntypedStorage.cpu)  # type: ignore[method-assign]


def strategy() -> SingleDeviceStrategy:
    """Return what puts a Trainer on the device."""
    return SingleDeviceStrategy(device=torch.device(NAME, 0), accelerator=Simulated())


class Simulated(Accelerator):
    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


def _module(generator: torch.Generator) -> types.ModuleType:
    """Return what ``torch.cuda`` is for CUDA, as far as it is asked for."""
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed = module.manual_seed_all = generator.manual_seed
    module.get_rng_state = lambda device=None: generator.get_state()
    module.set_rng_state = lambda state, device=None: generator.set_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    return module


# Copies of storages, which copies of tensors and checkpoints are made of, are for devices that PyTorch knows.


def _copied(native: Any) -> Any:
    def deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if tensor.device.type != NAME:
            return native(tensor, memo)
        if id(tensor) not in memo:
            copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            memo[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
        return memo[id(tensor)]

    return deepcopy


def _on_the_host(native: Any) -> Any:
    def cpu(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if storage.device.type != NAME:
            return native(storage)
        whole = torch.empty(0, dtype=torch.uint8, device=NAME).set_(storage, 0, (storage.nbytes(),), (1,))
        return whole.cpu().untyped_storage()

    return cpu
