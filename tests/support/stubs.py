"""Empty modules in the places of packages that an import asks for and that are not used."""

from __future__ import annotations

from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NOT_USED = ("torchvision", "gym", "qpth")
"""What learn2learn imports for its data sets, environments and MetaOptNet; `make test` leaves them out."""


class Stub(ModuleType):
    """A module in which every name is a class, which takes any arguments."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *_, **__: None})


class Stubs(MetaPathFinder, Loader):
    """Finds a :class:`Stub` for each package of ``NOT_USED`` and all that is below."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in NOT_USED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
