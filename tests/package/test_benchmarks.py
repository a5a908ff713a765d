"""The benchmarks of cost run and keep what they found; what they measure with measures; `make bench` knows them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
ROOMS = [FOLDER / name for name in ("cost", "accuracy", "peers", "benchopt", "papers", "public_modules", "versions")]
SCRIPTS = {path.stem for room in ROOMS for path in room.glob("*.py")}
RUNS = {
    "chunk_choice": ["--nets", "small MLP", "--repeats", "1", "--inner-steps", "1", "--seconds", "0"],
    "cost_against_depth": ["--depths", "1", "2", "--seconds", "0"],
    "cost_against_directions": ["--nets", "MLP", "--directions", "1", "2", "--seconds", "0"],
    "cost_against_size": ["--sizes", "4", "8", "--seconds", "0"],
    "long_runs": ["--parts", "recomputation", "memory", "--depth", "16", "--repeats", "1"],
    "trainer_overhead": ["--problems", "small", "--rounds", "1", "--steps", "1"],
}
"""The smallest run of each script that others build on."""

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that imports a file of the folder, or of a room of it; results go elsewhere."""
    for folder in (*ROOMS, FOLDER):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(importlib.import_module("support.results"), "RESULTS", tmp_path)
    return importlib.import_module


def numbers(found: Any) -> list[float]:
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list):
        return [number for each in found for number in numbers(each)]
    return [found] if isinstance(found, float) else []


@needs_linux
@forks
@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs(name: str, benchmark: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    returned = benchmark(name).main(RUNS[name])
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert numbers(record["results"])
    assert len(numbers(record["results"])) == len(numbers(returned))
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert name == "long_runs" or (tmp_path / f"{name}.png").stat().st_size > 10_000


@needs_linux
@forks
def test_other_parts_are_kept(benchmark: Any) -> None:
    pytest.importorskip("transformers")
    long_runs = benchmark("long_runs")
    first = long_runs.main(["--parts", "memory", "--depth", "16"])
    both = long_runs.main(["--parts", "recomputation", "--depth", "16", "--repeats", "1"])
    assert both["memory"] == first["memory"]
    assert set(both) == {"memory", "recomputation"}


def test_the_fastest_of_the_turns_counts(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measure: ModuleType = benchmark("support.measure")
    seconds = {"a": iter([9.0, 3.0, 1.0, 2.0]), "b": iter([9.0, 5.0, 6.0, 7.0])}
    now, order = [0.0], []

    def run(name: str) -> None:
        order.append(name)
        now[0] += next(seconds[name])

    monkeypatch.setattr(measure.time, "process_time", lambda: now[0])
    found = measure.least_seconds({name: lambda name=name: run(name) for name in seconds}, repeats=3)
    assert found == {"a": 1.0, "b": 5.0}  # the 9 of the warm-up would count otherwise
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]


PEAKS = """
import torch
from support.measure import peak

def ones(mebibytes):
    return torch.ones(mebibytes * 2**18)

for run in (lambda: ones(64), lambda: [ones(32), ones(32)], lambda: (ones(32).sum(), ones(32).sum())):
    print(peak(run, lambda: ones(1)))
"""


@needs_linux
def test_a_peak_is_what_is_held_at_once() -> None:
    """In a process of its own: what other tests have freed in this one would be used again."""
    command = [sys.executable, "-W", "ignore", "-c", PEAKS]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == [pytest.approx(size, abs=4) for size in (64, 64, 32)]


@needs_linux
@forks
def test_a_peak_of_what_fails(benchmark: Any) -> None:
    with pytest.raises(RuntimeError, match="The estimate failed: run it without a fork to see why."):
        benchmark("support.measure").peak(lambda: 1 / 0)


def test_the_readme_has_every_script_and_make_bench_those_it_says() -> None:
    text = (FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| .* \| \[`(\w+)`\]\(\w+/\1\.py\) \|.*\| ?([\w ]*) \|$", text, re.M)
    assert [path for path in re.findall(r"\]\(([^#)]+)\)", text) if not (FOLDER / path).is_file()] == []
    bench = re.search(r"^BENCH \?= ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert bench is not None
    chosen = bench[1].replace("\\\n", " ").split()
    assert {name for name, _ in rows} == SCRIPTS
    assert {name for name, said in rows if said == "yes"} == set(chosen)
    assert len(chosen) == len(set(chosen))


@pytest.fixture
def speed(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the benchmark beside other libraries, with cases of a tiny net."""
    for library in ("higher", "torchopt"):
        pytest.importorskip(library)
    module = benchmark("data_cleaning_speed")
    for name, case in module.CASES.items():
        tiny = case._replace(net=lambda: torch.nn.Linear(12, 10), shape=(12,), examples=8, steps=4)
        monkeypatch.setitem(module.CASES, name, tiny)
    return module


@pytest.mark.filterwarnings("ignore")
def test_learn2learn_can_be_imported_after_its_benchmark(benchmark: Any) -> None:
    """The benchmark takes its MAML without the rest; the next import must not find half a package."""
    for library in ("higher", "torchopt"):
        pytest.importorskip(library)
    if importlib.util.find_spec("learn2learn") is None:
        pytest.skip("learn2learn is not installed")
    sys.modules.pop("support.maml_peers", None)
    assert "learn2learn" in benchmark("support.maml_peers").PEERS
    assert not [name for name in sys.modules if name.split(".")[0] == "learn2learn"]


@pytest.mark.parametrize("name", ["mlp", "implicit", "adam"])
@pytest.mark.filterwarnings("ignore")  # the other libraries' own
def test_other_libraries_compute_our_hypergradients(name: str, speed: Any) -> None:
    """But for those that benchmarks/results/peers.md lists: their rows say how they differ, or why they do not run."""
    rows = speed.compare(speed.contenders(speed.CASES[name]), speed.CASES[name])
    others = {(row["method"], row["library"]) for row in rows if not row.get("same")}
    assert others <= {
        *(("CG", "Betty"), ("identity", "BOAT"), ("reverse", "Betty")),
        *((("reverse", "higher"), ("reverse", "BOAT")) if name == "adam" else ()),
    }
    assert {"by hand", "TorchOpt"} & {row["library"] for row in rows}


@pytest.mark.filterwarnings("ignore")
def test_speed_beside_other_libraries(speed: Any, tmp_path: Path) -> None:
    options = ["--rounds", "1", "--repeats", "1"]
    first = speed.main(["--cases", "mlp", *options])
    both = speed.main(["--cases", "adam", *options])
    assert both["mlp"] == first["mlp"]
    written = json.loads((tmp_path / "data_cleaning_speed.json").read_text())["results"]
    assert set(both) == set(written) == {"mlp", "adam"}
    assert all(row["cpu seconds"] > 0 for case in both.values() for row in case["rows"] if row.get("same"))
    assert (tmp_path / "data_cleaning_speed.png").stat().st_size > 10_000


@pytest.mark.slow
def test_where_time_goes(benchmark: Any, tmp_path: Path) -> None:
    """The parts make up the whole, where nothing is lost between them; operations have the kind of their callers."""
    pytest.importorskip("transformers")
    script = benchmark("where_time_goes")
    parts = ["--parts", "directions", "recomputation", "trainer"]
    found = script.main([*parts, "--repeats", "1", "--depth", "8", "--steps", "2"])
    assert json.loads((tmp_path / "where_time_goes.json").read_text())["results"] == found
    assert (tmp_path / "where_time_goes.png").stat().st_size > 10_000

    plain, direction = (found["directions"][f"{bar}, batch norm"] for bar in (script.PLAIN, "a direction"))
    assert 1.8 < direction["Mflop"] / plain["Mflop"] < 2.3
    assert min(plain["by kind"][kind] for kind in ("convolutions", "batch norm", "matrix products")) > 0
    assert found["directions"][f"{script.PLAIN}, no norm"]["by kind"]["batch norm"] == 0

    mflop = {name: row["Mflop"] for name, row in found["recomputation"].items()}
    for net, expected in (("perceptron", 2), ("CNN", 3)):  # the double backward is that of one large layer, or of many
        first, reverse, rooted = (
            mflop[f"{name}, {net}"] for name in ("FirstOrder()", "ReverseUnroll()", 'ReverseUnroll("sqrt")')
        )
        assert reverse / first == pytest.approx(expected, rel=0.08)
        assert 1 < rooted / reverse < 1.01 + first / reverse

    by_part = found["trainer"]["BilevelModule"]["by part"]
    assert sum(by_part.values()) == pytest.approx(found["trainer"]["BilevelModule"]["ms"])
    assert min(by_part.values()) > 0
    of_lightning = found["trainer"]["in a LightningModule"]["by part"]
    assert {part for part, value in of_lightning.items() if value} == {
        "the hypergradient",
        "Adam",
        "Lightning",
        "self.log",
    }


@pytest.mark.slow
@needs_linux
def test_a_checkout_against_itself(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script = benchmark("against_before")
    found = script.main(["--before", str(ROOT), "--quick", "--processes", "1", "--only", "1 sinusoid", "peak"])
    assert set(found) == {"MAML, 1 sinusoid", *script.HELD}
    assert found["MAML, 1 sinusoid"][script.LENGTH] == 0
    assert all(row["before"] > 0 and row["after"] > 0 for row in found.values())
    assert "same" in capsys.readouterr().out


@pytest.mark.slow
def test_another_package_is_not_taken_for_a_checkout(benchmark: Any, tmp_path: Path) -> None:
    script = benchmark("against_before")
    with script.Worker(tmp_path) as worker, pytest.raises(RuntimeError, match="Expected the package of"):
        worker.check()
