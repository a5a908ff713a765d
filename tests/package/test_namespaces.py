"""Projects on ``pytorch_lightning`` and on ``lightning.pytorch``: each in a process of its own, and mixed."""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest
from packaging.version import Version

from tests.support import processes

# Not imported here: the other tests of this process are to have one namespace.
pytestmark = pytest.mark.skipif(not find_spec("lightning"), reason="`lightning` is not installed")

OLD, NEW = "pytorch_lightning", "lightning.pytorch"
PARTS = {OLD: ["lightning_fabric", "pytorch_lightning"], NEW: ["lightning"]}
MIXED = {"the library, then lightning": (OLD, NEW), "lightning, the library, pytorch_lightning": (NEW, OLD)}
REFUSES_CALLBACKS = Version(version("pytorch-lightning")) < Version("2.6")
"""Whether a Trainer is not even made with callbacks of the other namespace, so that no code of ours runs."""
CALLBACKS = {
    "callback in the other's trainer": "ReverseUnroll",
    "monitor in the other's trainer": "HypergradientMonitor",
}

every_mixture = pytest.mark.parametrize("case", MIXED)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a case to what its process reported."""

    @cache
    def of(case: str) -> dict[str, Any]:
        output = processes.ran("namespace.py", case, tmp_path_factory.mktemp("case"))
        return json.loads(output.splitlines()[-1])

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


def test_it_is_noticed_of_one_that_is_imported_after_a_module_is_made(ran: Any) -> None:
    """The order of a notebook: what is handed to a Trainer next asks again."""
    found = ran("a module, then lightning")
    assert found["said"] is not None
    assert len(found["warnings"]) == 1
    assert "are both imported" in found["warnings"][0]


@every_mixture
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("the other's module wrapped", "Cannot use `bilevel` with `Net`, which is of `{other}`. This is because"),
        *(
            (what, f"Cannot use `{name}` in a `Trainer`, which is of `{{other}}`.")
            for what, name in CALLBACKS.items()
            if not REFUSES_CALLBACKS
        ),
    ],
)
def test_what_reaches_us_is_refused(ran: Any, case: str, what: str, message: str) -> None:
    own, other = MIXED[case]
    kind, text = ran(case)[what]
    assert kind == "MisconfigurationError"
    assert text.startswith(message.format(other=other))
    assert f"lightning_bilevel uses `{own}` here" in text
    assert f"Import `{other}` before `lightning_bilevel`" in text


NO_MODULE = ("TypeError", "`model` must be a `LightningModule`")
NO_CALLBACK = ("ValueError", "Expected a parent")
FIRST = NO_CALLBACK if REFUSES_CALLBACKS else NO_MODULE


@every_mixture
@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("module in the other's trainer", *FIRST),
        ("wrapped in the other's trainer", *FIRST),
        *((what, *NO_CALLBACK) for what in CALLBACKS if REFUSES_CALLBACKS),
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
def test_callbacks_of_the_other_namespace_that_only_watch_do_no_harm_or_are_refused(ran: Any, case: str) -> None:
    found = ran(case)["the other's callback"]
    if REFUSES_CALLBACKS:
        own, other = MIXED[case]
        assert found[0] == "TypeError"
        assert found[1].startswith(f"You passed a `{other}` object (Timer) to a `{own}` Trainer.")
    else:
        assert found is None
