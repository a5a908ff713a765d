"""Runs a script of the tests in processes of its own, which Lightning may multiply."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKERS = Path(__file__).parent / "workers"
TIMEOUT = 600  # a hang; a script takes half a minute, and many times that on a machine that is busy


def ran(script: str | Path, *arguments: object) -> str:
    """Run ``python script arguments...``, one thread each, and return what it prints; fail with it if it fails.

    Args:
        script: a file in ``workers/``, or a path.
        arguments: what it gets, as text.
    """
    # What Lightning leaves in the environment would make it think that this is one of several processes already.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PL_", "MASTER_", "LOCAL_"))
    }
    paths = [ROOT, ROOT / "examples", os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(WORKERS / script), *map(str, arguments)],
        env={**environment, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its session: the process and those that it started
        output, errors = process.communicate()
        pytest.fail(f"The processes hang.\n{output[-3000:]}\n{errors[-3000:]}")
    assert process.returncode == 0, f"{output[-5000:]}\n{errors[-5000:]}"
    return output
