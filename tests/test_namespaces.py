"""Projects on ``pytorch_lightning`` and on ``lightning.pytorch``: each in a process of its own, and mixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Not imported here: the other tests of this process are to have one namespace.
pytestmark = pytest.mark.skipif(not find_spec("lightning"), reason="`lightning` is not installed")

OLD, NEW = "pytorch_lightning", "lightning.pytorch"
PARTS = {OLD: ["lightning_fabric", "pytorch_lightning"], NEW: ["lightning"]}
MIXED = {"the library, then lightning": (OLD, NEW), "lightning, the library, pytorch_lightning": (NEW, OLD)}
TIMEOUT = 240  # a hang; a process takes some 10 seconds

every_mixture = pytest.mark.parametrize("case", MIXED)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a case to what its process reported."""

    @cache
    def of(case: str) -> dict[str, Any]:
        root = Path(__file__).parent
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "MASTER_", "LOCAL_"))}
        path = os.pathsep.join([str(root.parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, str(root / "namespace_worker.py"), case, str(tmp_path_factory.mktemp("case"))],
            env={**keep, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        return json.loads(done.stdout.splitlines()[-1])

    return of


@pytest.mark.parametrize(
    ("case", "namespace", "loaded"),
    [
        (OLD, OLD, PARTS[OLD]),
        (NEW, NEW, PARTS[NEW]),
        ("only lightning installed", NEW, PARTS[NEW]),
        ("the library, then lightning", OLD, PARTS[OLD]),
        ("lightning, the library, pytorch_lightning", NEW, PARTS[NEW]),
        pytest.param("both, then the library", OLD, [*PARTS[NEW], *PARTS[OLD]], marks=pytest.mark.slow),
    ],
)
def test_the_first_that_is_imported_is_used(ran: Any, case: str, namespace: str, loaded: list[str]) -> None:
    """And the other one is not imported by us."""
    assert ran(case)["namespace"] == namespace
    assert ran(case)["loaded"] == loaded


@pytest.mark.parametrize("case", [OLD, NEW])
def test_all_of_it_works_in_one_namespace(ran: Any, case: str) -> None:
    found = ran(case)
    assert found["base"]
    assert found["resume"]  # bit for bit
    assert found["strategy"]  # registered as "ddp_directions" with this namespace's Trainer
    assert found["shared"]  # one process with all directions
    assert 0 < found["adapted"] < 10
    assert found["bilevel"]
    assert found["monitor"] == pytest.approx(1)
    assert found["cli"] == 4
    assert found["warnings"] == []


def test_the_namespaces_compute_the_same(ran: Any) -> None:
    assert ran(OLD)["adapted"] == ran(NEW)["adapted"]
    assert ran(OLD)["bilevel"] == ran(NEW)["bilevel"]


@every_mixture
def test_mixing_is_noticed_with_what_to_do(ran: Any, case: str) -> None:
    """Where Lightning raises first, and says little, this warning has come before."""
    own, other = MIXED[case]
    (warning,) = ran(case)["warnings"]
    assert warning.startswith(f"`{own}` and `{other}` are both imported")
    assert f"lightning_bilevel uses `{own}`" in warning
    assert f"If yours come from `{other}`, import it before `lightning_bilevel`" in warning
    assert ran(case)["nothing mixed"] is None


@every_mixture
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("the other's module wrapped", "Cannot use `bilevel` with `Net`, which is of `{other}`. This is because"),
        ("callback in the other's trainer", "Cannot use `ReverseUnroll` in a `Trainer`, which is of `{other}`."),
        ("monitor in the other's trainer", "Cannot use `HypergradientMonitor` in a `Trainer`, which is of `{other}`."),
    ],
)
def test_what_reaches_us_is_refused(ran: Any, case: str, what: str, message: str) -> None:
    own, other = MIXED[case]
    kind, text = ran(case)[what]
    assert kind == "MisconfigurationError"
    assert text.startswith(message.format(other=other))
    assert f"lightning_bilevel uses `{own}` here" in text
    assert f"Import `{other}` before `lightning_bilevel`" in text


@every_mixture
@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("module in the other's trainer", "TypeError", "`model` must be a `LightningModule`"),
        ("wrapped in the other's trainer", "TypeError", "`model` must be a `LightningModule`"),
        ("the other's data module", "ValueError", "Expected a parent"),
        ("the other's ddp_directions", "ValueError", "You selected an invalid strategy name"),
        ("parallel strategy in the other's trainer", "ValueError", "You selected an invalid strategy name"),
    ],
)
def test_what_lightning_refuses(ran: Any, case: str, what: str, kind: str, message: str) -> None:
    """Before any of our code runs. So nothing is mixed without an error."""
    found, text = ran(case)[what]
    assert found == kind
    assert text.startswith(message)


@every_mixture
def test_callbacks_of_the_other_namespace_that_only_watch_do_no_harm(ran: Any, case: str) -> None:
    assert ran(case)["the other's callback"] is None
