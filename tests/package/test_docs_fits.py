"""Every bilevel module that a page defines can be fitted, also where the page takes only an estimate of it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pytorch_lightning import Trainer

import lightning_bilevel
from lightning_bilevel import BilevelModule
from tests.package.test_docs import ALONE, PAGES, Block, blocks, execute, missing
from tests.support.modules import listed, trainer
from tests.support.seeds import forked


class Program(NamedTuple):
    """What runs in one namespace.

    Attributes:
        page: where it is.
        blocks: those that run, or would where packages are installed.
        modules: the definitions of bilevel modules in them, by name; what is marked as not run says why itself.
    """

    page: Path
    blocks: list[Block]
    modules: dict[str, ast.ClassDef]

    @property
    def fits(self) -> bool:
        """Whether it runs a fit, of which ``test_programs_run`` knows."""
        return any(".fit(" in block.code or "CLI(" in block.code for block in self.blocks)


def programs() -> list[Program]:
    """Return those that define a bilevel module."""
    found = []
    for page in PAGES:
        run = [block for block in blocks(page) if block.mark != "not run"]
        for together in [[block] for block in run] if page.name in ALONE else [run]:
            modules: dict[str, ast.ClassDef] = {}
            for node in ast.parse("\n".join(block.code for block in together)).body:
                if isinstance(node, ast.ClassDef):
                    bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                    if bases & {"BilevelModule", *modules}:
                        modules[node.name] = node
            if modules:
                found.append(Program(page, together, modules))
    return found


ESTIMATED = [program for program in programs() if not program.fits]


def test_there_are_programs_of_both_kinds() -> None:
    assert ESTIMATED
    assert any(program.fits for program in programs())


@pytest.mark.filterwarnings("ignore:The inner problem does not depend on the outer parameters")  # a hypernetwork
@pytest.mark.parametrize("program", ESTIMATED, ids=lambda program: f"{program.page.stem}-{'-'.join(program.modules)}")
def test_a_module_that_is_only_estimated_can_be_fitted(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calls: dict[str, Any] = {}
    original = lightning_bilevel.hypergradient

    def hypergradient(module: Any, strategy: Any, episode: Any, **options: Any) -> Any:
        calls[type(module).__name__] = strategy, episode
        return original(module, strategy, episode, **options)

    monkeypatch.setattr(lightning_bilevel, "hypergradient", hypergradient)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with forked(0):
        for block in program.blocks:
            if not missing(block):
                execute(program.page, block._replace(prints=None), namespace)
        for name, definition in program.modules.items():
            if name not in namespace:  # in a block that needs a package
                exec(compile(ast.Module([definition], []), str(program.page), "exec"), namespace)
            kind = namespace[name]
            strategy, episode = next(calls[each.__name__] for each in kind.__mro__ if each.__name__ in calls)
            fitted(kind, strategy, episode)


def fitted(kind: Any, strategy: Any, episode: Any) -> Trainer:
    """Fit for two steps, with an outer optimizer where the page has none."""
    if kind.configure_optimizers is BilevelModule.configure_optimizers:
        configure = {"configure_optimizers": lambda self: torch.optim.Adam(self.outer_parameters())}
        kind = type(kind.__name__, (kind,), configure)
    fit = trainer(strategy, max_steps=2)
    fit.fit(kind(), listed([episode] * 2))
    assert fit.global_step == 2
    assert torch.isfinite(fit.callback_metrics["outer_loss"])
    return fit
