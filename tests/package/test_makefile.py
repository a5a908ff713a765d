"""The first commands of a checkout, with something else in pip's place."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = '#!/bin/sh\necho "Collecting torch"; sleep {seconds}; echo "Installing torch"; exit {code}\n'

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="`make` is not installed")


def installed(folder: Path, seconds: int, code: int) -> subprocess.CompletedProcess[str]:
    """Run an installation that takes so long, without a terminal."""
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PIP.format(seconds=seconds, code=code))
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", ".venv/pyvenv.cfg"):
        (folder / name).touch()
    return subprocess.run(
        ["make", ".venv/installed-test"], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )


def test_an_installation_that_fails_shows_its_log(tmp_path: Path) -> None:
    made = installed(tmp_path, 0, 3)
    assert made.returncode
    assert "Installing torch\nstatus 3" in made.stdout
    assert not (tmp_path / ".venv" / "installed-test").exists()


@pytest.mark.slow
def test_an_installation_without_a_terminal_says_that_it_goes_on(tmp_path: Path) -> None:
    made = installed(tmp_path, 11, 0)
    assert made.returncode == 0
    assert made.stderr.splitlines().count("Collecting torch") == 2
    assert (tmp_path / ".venv" / "installed-test").exists()
