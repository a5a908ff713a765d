"""Virtual environments of pinned versions, made once and kept outside of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
DEFAULT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightning_bilevel" / "public_modules"
NO_DEPS = "# no-deps:"
"""The line of a requirements file with what is installed without its dependencies: lightly asks for torchvision."""


def python_of(name: str, folder: Path) -> Path:
    """Return the interpreter of an environment, and make it if it is not there or its requirements have changed.

    Args:
        name: of ``requirements/NAME.txt``.
        folder: where the environments are.
    """
    place, wanted = folder / name, (REQUIREMENTS / f"{name}.txt").read_text()
    python, made_from = place / "bin" / "python", place / "made-from.txt"
    if not made_from.is_file() or made_from.read_text() != wanted:
        print(f"Making {place}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
        subprocess.run([*install, "--upgrade", "pip"], check=True)
        subprocess.run([*install, "-r", str(REQUIREMENTS / f"{name}.txt")], check=True)
        for line in wanted.splitlines():
            if line.startswith(NO_DEPS):
                subprocess.run([*install, "--no-deps", *line.removeprefix(NO_DEPS).split()], check=True)
        made_from.write_text(wanted)
    return python
