"""Estimates and fits on a simulated device: no GPU is needed to see where a tensor would be on the wrong one."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch.utils.cpp_extension import is_ninja_available

from tests.support.processes import ran

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="written for the headers of torch 2.13"),
    pytest.mark.skipif(not is_ninja_available() or not shutil.which("c++"), reason="needs a C++ compiler and ninja"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    printed = ran("device.py", tmp_path_factory.mktemp("device"))
    return dict(json.loads(line) for line in printed.splitlines() if line.startswith("["))


def test_the_device_is_another(found: dict[str, Any]) -> None:
    """Or nothing below would mean anything."""
    assert "on one device, found two" in found["mixed"] or "on the same device" in found["mixed"]
    assert "generator" in found["drawn elsewhere"]


@pytest.mark.parametrize("kind", ["estimate", "fit", "audit"])
def test_it_computes_what_the_cpu_does(kind: str, found: dict[str, Any]) -> None:
    mine = {name: result for name, result in found.items() if name.startswith(kind)}
    assert mine
    allowed = 1e-5 if kind == "fit" else 1e-9  # fits are in single precision
    assert {name: result for name, result in mine.items() if isinstance(result, str) or result > allowed} == {}
