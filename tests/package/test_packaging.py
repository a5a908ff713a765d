"""What is shipped: one version, every module, no package that was not asked for; and the distributions themselves."""

from __future__ import annotations

import ast
import importlib.util
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from packaging.version import Version

import lightning_bilevel

PACKAGE = "lightning_bilevel"
ROOT = Path(__file__).parents[2]
MODULES = [PACKAGE, *(found.name for found in pkgutil.walk_packages(lightning_bilevel.__path__, f"{PACKAGE}."))]
OPTIONAL = {"higher", "jsonargparse", "learn2learn", "matplotlib", "rich", "scipy", "sklearn", "transformers"}
FOLDERS = (PACKAGE, ".ci", ".github", "benchmarks", "docs", "examples", "tests")
EXAMPLES = [path.name for path in sorted((ROOT / "examples").glob("*.py")) if "def main" in path.read_text()]
BUILT = ("_build", "_generated", "reference", "__pycache__")

USER = """
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_bilevel import BilevelModule, Episode, EpisodeLoader, ForwardGradient, Hypergradient, hypergradient
from lightning_bilevel.inner_optimizers import SGD, InnerOptimizer


class Ridge(BilevelModule):
    def __init__(self) -> None:
        super().__init__(inner_steps=5, inner_start="reset")
        self.net = nn.Linear(3, 1)
        self.log_decay = nn.Parameter(torch.tensor(-3.0))

    def inner_parameters(self) -> nn.Module:
        return self.net

    def outer_parameters(self) -> list[nn.Parameter]:
        return [self.log_decay]

    def inner_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        penalty = self.log_decay.exp() * self.net.weight.square().sum()
        return torch.nn.functional.mse_loss(self.net(x), y) + penalty

    def outer_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)

    def configure_inner_optimizer(self) -> InnerOptimizer:
        return SGD(lr=0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.outer_parameters(), lr=0.1)


batch = torch.ones(4, 3), torch.ones(4, 1)
found: Hypergradient = hypergradient(Ridge(), ForwardGradient(num_directions=2), Episode([batch], batch))
size: float = found.grads["log_decay"].norm().item()
trainer = pl.Trainer(callbacks=[ForwardGradient(directions=None)])
episodes: EpisodeLoader = EpisodeLoader(inner=[batch], outer=[batch], inner_batches=2)
wrong: str = found.value
"""
"""A module of somebody who checks types strictly; its last line has the one mistake."""


def packaging(section: str, option: str) -> str:
    """Return an option of setup.cfg."""
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    return settings[section][option]


REQUIRED = dict(line.split(">=") for line in packaging("options", "install_requires").split())
"""The lower bound of every requirement: ``{"torch": "2.4", ...}``."""


def matrix() -> list[dict[str, str]]:
    """Return the rows of the table of versions that the tests run with in continuous integration."""
    workflow: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text())
    return workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]


def test_the_version_is_written_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", lightning_bilevel.__version__)
    assert version(PACKAGE) == lightning_bilevel.__version__
    assert packaging("metadata", "version") == f"attr: {PACKAGE}.__version__"
    texts = {path: path.read_text() for path in [*ROOT.glob("*.cfg"), *ROOT.glob("*.toml"), *ROOT.glob("docs/*.py")]}
    assert [path for path, text in texts.items() if lightning_bilevel.__version__ in text] == []


def test_every_module_imports_and_brings_no_optional_package_along() -> None:
    """After Lightning, which imports some of them itself where they are installed."""
    script = (
        "import importlib, sys, pytorch_lightning; before = set(sys.modules); "
        f"[importlib.import_module(name) for name in {MODULES}]; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert PACKAGE in done.stdout.split()
    assert not OPTIONAL & set(done.stdout.split())


def test_everything_imported_is_required() -> None:
    """A package that torch or Lightning happens to bring may be gone with their next release."""
    found = set()
    for path in (ROOT / PACKAGE).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).split(".")[0])
    others = found - set(sys.stdlib_module_names) - {PACKAGE, "lightning"}  # `host.py` takes either Lightning
    owners = packages_distributions()
    needed = {name: {owner.replace("-", "_").lower() for owner in owners[name]} for name in others}
    required = {name.replace("-", "_") for name in REQUIRED}
    assert [name for name, distributions in needed.items() if not distributions & required] == []
    assert required <= set.union(*needed.values())


def test_the_matrix_has_every_python_and_the_oldest_and_newest_hosts() -> None:
    classifiers = packaging("metadata", "classifiers")
    assert {row["python"] for row in matrix()} == set(re.findall(r"Python :: (3\.\d+)", classifiers))
    for package, column in (("torch", "torch"), ("pytorch-lightning", "lightning")):
        assert {row[column] for row in matrix()} == {f"{REQUIRED[package]}.*", "2.*"}
        assert Version(version(package)).major == 2  # else "2.*" is no longer the newest


class Distributions(NamedTuple):
    """Both distributions, the files they are made of, and the interpreter of where the wheel is installed."""

    checkout: Path
    wheel: Path
    source: Path
    python: Path


def test_the_measurements_of_the_readme_are_those_of_the_benchmark() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "maml_speed.json").read_text())
    readme = (ROOT / "README.md").read_text()
    columns = ["lightning_bilevel, compiled", "lightning_bilevel", *found["settings"]["peers"]]
    assert f"| | {' | '.join(columns)} |" in readme
    for task in ("sinusoids", "images"):
        seconds = found["results"][task]["cpu seconds"]
        times = [1000 * seconds[name] if name in seconds else None for name in columns]
        cells = ["–" if time is None else f"{time:.0f}" if time >= 100 else f"{time:.1f}" for time in times]
        row = next(line for line in readme.splitlines() if line.startswith(f"| {task}:"))
        assert row.endswith(f"| {' | '.join(cells)} |")
    steps = found["settings"]["rounds"] * found["settings"]["steps"]
    assert f"least CPU time of {steps} steps each" in readme
    for peer, number in found["settings"]["peers"].items():
        assert f"{peer} {number}" in readme


def test_the_first_screen_of_the_readme_has_the_numbers_of_the_demo() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "learned_start.json").read_text())["results"]["reverse"]
    assert len(found) == 5
    screen = " ".join((ROOT / "README.md").read_text().split("## Example")[0].split())
    mean = {name: sum(run["psnr"][name]["3"] for run in found.values()) / 5 for name in found["0"]["psnr"]}
    assert f"{mean['learned start and rate']:.1f} dB on digits that none has seen" in screen
    assert f"is at {mean['trained on all digits']:.1f} dB after three steps" in screen
    assert f"the nearest of 1,200 digits is at {mean['the nearest digit']:.1f}" in screen
    assert max(mean, key=lambda name: mean[name]) == "learned start and rate"


def relative(text: str) -> list[str]:
    """Return the targets of links and pictures that are no addresses."""
    return re.findall(r"\]\((?!https?://)([^)]*)\)", text)


def test_links_of_the_description_are_cut_or_absolute() -> None:
    """Which of the two, one setting says."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    readme = (ROOT / "README.md").read_text()
    assert len(relative(readme)) > 20
    cut = script.description(readme, "")
    assert "](" not in re.sub(r"\]\(https?://", "", cut)
    assert "docs/images" not in cut
    absolute = script.description(readme, "https://example.org/files/")
    assert relative(absolute) == []
    assert absolute.count("https://example.org/files/") == len(relative(readme))
    assert script.description("[a](https://b.c) ![d](e.png)\n\n[f](g.md)", "") == "[a](https://b.c) f"
    assert packaging("description", "files") == ""


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#\s:]+)\)", (ROOT / page).read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Build the source distribution and, from it, the wheel; install that where this checkout cannot be seen."""
    folder = tmp_path_factory.mktemp("distributions")
    checkout = folder / "checkout"
    checkout.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, checkout)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns(*BUILT))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(checkout))
    (wheel,), (source,) = folder.glob("dist/*.whl"), folder.glob("dist/*.tar.gz")

    venv.create(folder / "clean", with_pip=False, symlinks=True)
    python = folder / "clean" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    # The requirements come from this environment. A path in a .pth file adds its packages, and not what is installed
    # there as editable: this package.
    (site,) = (folder / "clean").glob("lib/python*/site-packages")
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Distributions(checkout, wheel, source, python)


def run(*command: str, cwd: Path | None = None) -> str:
    """Run a command; return what it prints, or fail with it."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files(checkout: Path, folder: str = ".") -> set[str]:
    """Return the names of the files below a folder of the checkout."""
    return {path.relative_to(checkout).as_posix() for path in (checkout / folder).rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(distributions: Distributions) -> None:
    names = set(zipfile.ZipFile(distributions.wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == files(distributions.checkout, PACKAGE)
    assert f"{PACKAGE}/py.typed" in names


@pytest.mark.slow
def test_the_source_distribution_has_the_checkout(distributions: Distributions) -> None:
    names = {name.partition("/")[2] for name in tarfile.open(distributions.source).getnames()}
    assert {"LICENSE", "tests/package/test_packaging.py", "examples/data_cleaning.py", "docs/index.md"} <= names
    left_out = {".git", ".gitignore", ".coverage"}  # `.git` is a file in a linked worktree
    lacking = {name for name in files(distributions.checkout) - names if not name.endswith((".png", ".npz"))}
    assert lacking <= left_out
    assert distributions.source.stat().st_size < 2_000_000


@pytest.mark.slow
def test_the_description_stands_by_itself(distributions: Distributions) -> None:
    """On a package index no file lies beside it."""
    with zipfile.ZipFile(distributions.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        head, _, text = wheel.read(name).decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head
    assert "Project-URL" not in head  # until there is one that leads somewhere
    assert "make demo" in text
    assert "## Hypergradient strategies" in text
    assert relative(text) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_outside_the_checkout(distributions: Distributions, name: str, tmp_path: Path) -> None:
    with tarfile.open(distributions.source) as archive:
        archive.extractall(tmp_path, filter="data")
    (example,) = tmp_path.glob(f"*/examples/{name}")
    where = run(str(distributions.python), "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(distributions.python.parents[1])
    run(str(distributions.python), "-W", "ignore", str(example), "--smoke", "--quiet", "--output", "out", cwd=tmp_path)
    assert list((tmp_path / "out").glob("*.png"))


@pytest.mark.slow
def test_a_strictly_typed_project(distributions: Distributions, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(distributions.python), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    last = len(USER.splitlines())
    assert len(errors) == 1, done.stdout
    assert errors[0].startswith(f"user.py:{last}: error: Incompatible types in assignment")
