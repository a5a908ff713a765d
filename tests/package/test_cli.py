"""LightningCLI: the example's configurations run, and YAML can say everything that a constructor can."""

from __future__ import annotations

import inspect
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.cli import LightningCLI
from torch import Tensor

import data_cleaning_cli
from lightning_bilevel import (
    BOME,
    DARTS,
    FSLA,
    MEHA,
    PES,
    PZOBO,
    SGD,
    SOBA,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    EvoGrad,
    FirstOrder,
    ForwardGradient,
    ForwardUnroll,
    GammaGreedy,
    HypergradientMonitor,
    HypergradientSchedule,
    HypergradientStrategy,
    ImplicitGradient,
    Lion,
    NAdam,
    PenaltyGradient,
    RAdam,
    ReverseUnroll,
    RMSprop,
    TruncatedReverse,
    ZerothOrder,
    directions,
    inner_optimizers,
    linear_solvers,
    strategies,
    tree,
)
from lightning_bilevel.directions import Blocks, Coordinate, DirectionSampler, Gaussian, Orthogonal, Rademacher, Sphere
from lightning_bilevel.host import Callback
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.linear_solvers import (
    GMRES,
    KFAC,
    ConjugateGradient,
    Dense,
    Identity,
    LinearSolver,
    Neumann,
    Nystrom,
)
from tests.support.modules import Maml, differing, identical, parameters
from tests.support.seeds import forgotten

CONFIGS = sorted((Path(data_cleaning_cli.__file__).parent / "configs").glob("*.yaml"))
pytestmark = pytest.mark.filterwarnings("ignore:`ConjugateGradient")  # after two inner steps, ten of its own are few
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Leave no seed behind: the command line sets one for the whole process."""
    with forgotten():
        yield


def run(command: str, folder: Path, config: Path, **options: Any) -> Any:
    """Run the example on a copy of ``config`` with short phases and few directions, which writes below ``folder``."""
    text = yaml.safe_load(config.read_text())
    text["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    text["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
    for callback in text["trainer"]["callbacks"]:
        for phase in callback["init_args"].get("phases", [])[:-1]:
            phase[1] = 1
        if "every_n_train_steps" in callback["init_args"]:
            callback["init_args"]["every_n_train_steps"] = 2
    copy = folder / config.name
    copy.write_text(yaml.safe_dump(text, sort_keys=False))
    arguments = [command, "--config", str(copy), "--model.inner_steps", "2", "--data.steps_per_epoch", "4"]
    return data_cleaning_cli.run([*arguments, *(f"--{name}={value}" for name, value in options.items())])


# ---------------------------------------------------------------------------------------------------------------------
# The example
# ---------------------------------------------------------------------------------------------------------------------


@every_config
def test_fit(config: Path, tmp_path: Path) -> None:
    cli = run("fit", tmp_path, config, **{"trainer.max_epochs": 1})
    assert cli.trainer.global_step == 4
    assert cli.model.logits.abs().max() > 0
    assert cli.model.hparams.num_examples == len(cli.datamodule.train)
    log = Path(cli.trainer.logger.log_dir)
    assert "outer_loss" in (log / "metrics.csv").read_text()
    saved = yaml.safe_load((log / "config.yaml").read_text())["trainer"]["callbacks"]
    chosen = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    assert [each["class_path"] for each in saved] == [each["class_path"] for each in chosen]


def test_a_schedule_goes_through_its_phases(tmp_path: Path) -> None:
    (schedule,) = (config for config in CONFIGS if config.stem == "schedule")
    cli = run("fit", tmp_path, schedule, **{"trainer.max_epochs": 1})
    strategy = next(each for each in cli.trainer.callbacks if isinstance(each, HypergradientSchedule))
    kinds = [type(phase) for phase, _ in strategy.phases]
    assert kinds == [TruncatedReverse, ImplicitGradient, ForwardGradient]
    assert isinstance(strategy.phases[1][0].solver, ConjugateGradient)
    assert isinstance(strategy.phases[2][0].guide, TruncatedReverse)
    assert [strategy.phase(step) for step in range(4)] == [0, 1, 2, 2]
    assert cli.trainer.logged_metrics["hypergradient_phase"] == 2


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # every run has a folder of its own
def test_resume_and_validate(tmp_path: Path) -> None:
    (schedule,) = (config for config in CONFIGS if config.stem == "schedule")
    whole = run("fit", tmp_path, schedule, **{"trainer.max_steps": 4})
    half = run("fit", tmp_path, schedule, **{"trainer.max_steps": 2})
    (last,) = Path(half.trainer.logger.log_dir).rglob("last.ckpt")
    resumed = run("fit", tmp_path, schedule, **{"trainer.max_steps": 4, "ckpt_path": last})
    assert resumed.trainer.global_step == 4
    assert differing(parameters(resumed.model), parameters(whole.model)) == []
    assert identical(resumed.model.fit_context.state_dict(), whole.model.fit_context.state_dict())
    (last,) = Path(whole.trainer.logger.log_dir).rglob("last.ckpt")
    judged = run("validate", tmp_path, schedule, ckpt_path=last)
    assert differing(parameters(judged.model), parameters(whole.model)) == []
    assert 0 < judged.trainer.callback_metrics["test_accuracy"] <= 1


def test_the_sizes_follow_from_the_data(tmp_path: Path) -> None:
    assert data_cleaning_cli.num_examples(None, None) == 900
    assert data_cleaning_cli.num_examples("folder", None) == 5000
    assert data_cleaning_cli.num_pixels("folder") == 784
    cli = run("fit", tmp_path, CONFIGS[0], **{"trainer.max_steps": 1, "data.num_train": 300})
    assert cli.model.logits.shape == (300,)


@every_config
def test_print_config_shows_every_argument(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        data_cleaning_cli.run(["fit", "--config", str(config), "--print_config"])
    first = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"][0]
    strategy = getattr(strategies, first["class_path"].rsplit(".")[-1])
    # What is not given shows its default; jsonargparse leaves a `None` out of a subclass's arguments.
    shown = {name for name, value in inspect.signature(strategy).parameters.items() if value.default is not None}
    assert shown <= set(first["init_args"])


@pytest.mark.parametrize("name", ["ForwardGradient", "lightning_bilevel.HypergradientSchedule", "ZerothOrder"])
def test_help_is_the_docstring(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        data_cleaning_cli.run(["fit", f"--trainer.callbacks.help={name}"])
    shown = " ".join(capsys.readouterr().out.split())
    strategy = getattr(strategies, name.rsplit(".")[-1])
    assert inspect.getdoc(strategy).splitlines()[0].rstrip(".:") in shown
    for argument, text in _described(strategy).items():
        assert argument in shown
        assert text in shown, f"{argument}: {text}"


def _described(kind: type) -> dict[str, str]:
    """Return the arguments of a docstring's ``Args:`` with the first words about each."""
    lines = inspect.getdoc(kind).split("Args:\n")[1].split("\n\n")[0].splitlines()
    pairs = (line.strip().split(": ", 1) for line in lines if line.startswith("    ") and line[4] != " ")
    return {name: " ".join(text.split()[:4]).rstrip(".") for name, text in pairs}


# ---------------------------------------------------------------------------------------------------------------------
# Everything that a constructor takes
# ---------------------------------------------------------------------------------------------------------------------

BY_PATTERN = {"*.weight": 0.1, "*.bias": 0.2, "*": 0.3}  # the first that matches wins, so the order counts

OBJECTS: list[tuple[type, Any]] = [
    (HypergradientStrategy, FirstOrder()),
    (HypergradientStrategy, ReverseUnroll()),
    (HypergradientStrategy, ReverseUnroll(checkpoint="sqrt")),
    (HypergradientStrategy, ReverseUnroll(checkpoint=3)),
    (HypergradientStrategy, TruncatedReverse(steps=4)),
    (HypergradientStrategy, ForwardUnroll(chunk_size=2, mode="forward", warm_start=True)),
    (HypergradientStrategy, ForwardGradient()),
    (HypergradientStrategy, ForwardGradient(8, Orthogonal(), 4, TruncatedReverse(steps=2), "double_backward")),
    (HypergradientStrategy, ForwardGradient(8, guide=[TruncatedReverse(steps=2), FirstOrder()], remember=True)),
    (HypergradientStrategy, GammaGreedy(gamma=0.5)),
    (HypergradientStrategy, FSLA(beta=0.2, eta=0.5, tau=0.01, schedule="inverse_sqrt")),
    (HypergradientStrategy, PZOBO(num_directions=3, mu=0.5, directions=Sphere(), chunk_size=2)),
    (HypergradientStrategy, ZerothOrder(3, 0.5, "central", Coordinate(), 2)),
    (HypergradientStrategy, PES(num_directions=3, mu=0.5, chunk_size=2)),
    (HypergradientStrategy, PZOBO(3, guide=[FirstOrder()], remember=True)),
    (HypergradientStrategy, ZerothOrder(3, guide=FirstOrder(), remember=True)),
    (HypergradientStrategy, ImplicitGradient(solver=ConjugateGradient(max_iter=5, tol=1e-3, damping=0.1))),
    (HypergradientStrategy, ImplicitGradient(solver=Dense(), form="fixed_point", warm_start=True)),
    (HypergradientStrategy, ImplicitGradient(Neumann(4, step_size=0.1), batches="fresh")),
    (HypergradientStrategy, SOBA(tau=0.1, beta=0.2, eta=0.5, momentum="average")),
    (HypergradientStrategy, SOBA(momentum="recursive", period=10)),
    (HypergradientStrategy, SOBA(momentum="table")),
    (HypergradientStrategy, BOME(lr=0.1, eta=0.2, barrier="gap")),
    (HypergradientStrategy, MEHA(gamma=2.0, penalty=5.0, power=0.1)),
    (HypergradientStrategy, DARTS(radius=0.1)),
    (HypergradientStrategy, EvoGrad(num_copies=4, sigma=0.1, temperature=1.0, directions=Gaussian())),
    (HypergradientStrategy, PenaltyGradient(penalty=30.0, scheme="central")),
    (
        HypergradientStrategy,
        HypergradientSchedule(
            [
                (TruncatedReverse(2), 10),
                (ImplicitGradient(Nystrom(rank=3)), 20),
                (ForwardGradient(guide=GammaGreedy(0.9), directions=Gaussian()), None),
            ]
        ),
    ),
    (HypergradientStrategy, HypergradientSchedule([(HypergradientSchedule([(FirstOrder(), None)]), None)])),
    (Callback, HypergradientMonitor(reference=ForwardUnroll(), every_n_steps=3, samples=2)),
    (Callback, HypergradientMonitor(reference=False, cosine=0.9)),
    (LinearSolver, Neumann(terms=3, step_size=0.5)),
    (LinearSolver, ConjugateGradient(max_iter=3, tol=0.5, damping=0.25)),
    (LinearSolver, Nystrom(rank=3, rho=0.5, seed=7)),
    (LinearSolver, Dense()),
    (LinearSolver, ConjugateGradient(preconditioner=KFAC(0.5))),
    (LinearSolver, GMRES(max_iter=9, restart=3, tol=0.5)),
    (LinearSolver, KFAC(damping=0.5, samples=2, seed=7)),
    (LinearSolver, Identity(scale=0.5, adapt=True)),
    (DirectionSampler, Rademacher()),
    (DirectionSampler, Gaussian()),
    (DirectionSampler, Sphere()),
    (DirectionSampler, Coordinate()),
    (DirectionSampler, Orthogonal()),
    (DirectionSampler, Blocks(blocks=3)),
    (InnerOptimizer, SGD(0.5, 0.9, 0, 0.25, True, maximize=True)),
    (InnerOptimizer, SGD(BY_PATTERN, momentum=BY_PATTERN, dampening=0.5)),
    (InnerOptimizer, Adam(0.5, (0.5, BY_PATTERN), 0.25, BY_PATTERN, True, maximize=True)),
    (InnerOptimizer, AdamW(BY_PATTERN, (0.5, 0.25), 0.25, 0.5, True, maximize=True)),
    (InnerOptimizer, RMSprop(0.5, 0.25, 0.125, BY_PATTERN, 0.75, True, maximize=True)),
    *(
        (InnerOptimizer, kind(max_norm=0.5, projection=tree.detach))
        for kind in (SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam, Adamax, Adadelta, Lion)
    ),
    (InnerOptimizer, NAdam(0.5, (0.5, BY_PATTERN), 0.25, BY_PATTERN, 0.125, True, maximize=True)),
    (InnerOptimizer, RAdam(0.5, (0.5, BY_PATTERN), 0.25, BY_PATTERN, True, maximize=True)),
    (InnerOptimizer, Adamax(0.5, (0.5, BY_PATTERN), 0.25, BY_PATTERN, maximize=True)),
    (InnerOptimizer, Adadelta(0.5, 0.25, 0.125, BY_PATTERN, maximize=True)),
    (InnerOptimizer, Lion(0.5, (0.5, BY_PATTERN), 0.25, maximize=True)),
    (InnerOptimizer, Adagrad(0.5, 0.25, 0.125, BY_PATTERN, 0.75, maximize=True)),
]
BASES = (HypergradientStrategy, LinearSolver, DirectionSampler, InnerOptimizer)
PUBLIC = {
    found
    for module in (directions, inner_optimizers, linear_solvers, strategies)
    for found in map(vars(module).get, module.__all__)
    if inspect.isclass(found) and issubclass(found, BASES) and found not in BASES
}
ALIASES = {"betas": lambda made: (made.hyperparameters["betas[0]"], made.hyperparameters["betas[1]"])}


def argument(made: Any, name: str) -> Any:
    """Return what the constructor of ``made`` got for an argument."""
    if name in ALIASES:
        return ALIASES[name](made)
    return made.hyperparameters[name] if name in getattr(made, "hyperparameters", {}) else getattr(made, name)


def arguments(made: Any) -> dict[str, Any]:
    return {name: argument(made, name) for name in inspect.signature(type(made)).parameters}


def written(value: Any) -> Any:
    """Return a constructor's argument as one writes it in YAML."""
    if isinstance(value, (list, tuple)):
        return [written(entry) for entry in value]
    if isinstance(value, Mapping) or value is None or isinstance(value, (str, int, float)):
        return value
    if inspect.isfunction(value):
        return f"{value.__module__}.{value.__name__}"
    given = {name: written(each) for name, each in arguments(value).items()}
    return {"class_path": f"lightning_bilevel.{_room(value)}{type(value).__name__}", "init_args": given}


def _room(value: Any) -> str:
    rooms = {LinearSolver: "linear_solvers.", DirectionSampler: "directions.", InnerOptimizer: "inner_optimizers."}
    return next((room for kind, room in rooms.items() if isinstance(value, kind)), "")


def told(value: Any) -> Any:
    """Return nested constructor arguments in a form that ``==`` compares, with the order of mappings."""
    if isinstance(value, (list, tuple)):
        return [told(entry) for entry in value]
    if isinstance(value, Mapping):
        return [(name, told(entry)) for name, entry in value.items()]
    if value is None or isinstance(value, (str, int, float, Tensor)) or inspect.isfunction(value):
        return value
    return type(value).__name__, told(arguments(value))


def parsed(kind: type, text: str) -> tuple[Any, str]:
    """Return what YAML with the key ``made`` makes, and the YAML that the parser writes for it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--made", type=kind)
    config = parser.parse_string(text)
    return parser.instantiate(config).made, parser.dump(config)


@pytest.mark.parametrize(("kind", "made"), OBJECTS, ids=lambda value: type(value).__name__)
def test_round_trip(kind: type, made: Any) -> None:
    parsed_once, dumped = parsed(kind, yaml.safe_dump({"made": written(made)}, sort_keys=False))
    parsed_twice, again = parsed(kind, dumped)
    assert told(parsed_once) == told(made)
    assert told(parsed_twice) == told(made)
    assert again == dumped


@pytest.mark.parametrize(("kind", "made"), OBJECTS, ids=lambda value: type(value).__name__)
def test_the_class_alone_takes_the_defaults(kind: type, made: Any) -> None:
    path = f"lightning_bilevel.{_room(made)}{type(made).__name__}"
    needed = [name for name, each in inspect.signature(type(made)).parameters.items() if each.default is each.empty]
    given = {name: written(argument(made, name)) for name in needed}
    found, _ = parsed(kind, yaml.safe_dump({"made": {"class_path": path, "init_args": given}}))
    assert told(found) == told(type(made)(**{name: argument(made, name) for name in needed}))


def test_every_argument_of_every_public_class_is_there() -> None:
    """No class is forgotten, and every argument of each appears with a value that is not its default."""
    assert PUBLIC <= {type(made) for _, made in OBJECTS}
    for kind in {type(made) for _, made in OBJECTS}:
        for name, parameter in inspect.signature(kind).parameters.items():
            given = [told(argument(made, name)) for _, made in OBJECTS if type(made) is kind]
            default = None if parameter.default is parameter.empty else told(parameter.default)
            assert any(value != default for value in given), f"{kind.__name__}({name}=...)"


def test_a_bad_value_is_named() -> None:
    """By jsonargparse where the type says enough, by the constructor otherwise."""
    text = "made: {{class_path: lightning_bilevel.{}, init_args: {{{}}}}}"
    with pytest.raises(ArgumentError, match=r'"checkpoint":\n.*any of the Union subtypes'):
        parsed(HypergradientStrategy, text.format("ReverseUnroll", "checkpoint: log"))
    with pytest.raises(
        ValueError, match=r"^Expected `TruncatedReverse\(steps=\.\.\.\)` to be a positive integer, got 0"
    ):
        parsed(HypergradientStrategy, text.format("TruncatedReverse", "steps: 0"))


# --- A slot of its own, as in the recipe ---


class WithSlot(LightningCLI):
    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_lightning_class_args(HypergradientStrategy, "hypergradient", subclass_mode=True)


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (["--hypergradient=ForwardGradient"], ForwardGradient),
        (["--hypergradient=ForwardGradient", "--hypergradient.num_directions=3"], ForwardGradient),
        (["--hypergradient=lightning_bilevel.PZOBO"], PZOBO),
        (["--hypergradient=ImplicitGradient", "--hypergradient.solver=Dense"], ImplicitGradient),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_strategy_is_swapped_without_losing_other_callbacks(flags: list[str], kind: type) -> None:
    others = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=outer_loss", *QUIET]
    made = WithSlot(Maml, run=False, save_config_callback=None, args=[*others, *flags])
    found = [type(callback) for callback in made.trainer.callbacks]
    assert kind in found
    assert EarlyStopping in found
    assert sum(issubclass(each, HypergradientStrategy) for each in found) == 1
    if "--hypergradient.num_directions=3" in flags:
        (strategy,) = [each for each in made.trainer.callbacks if isinstance(each, ForwardGradient)]
        assert strategy.num_directions == 3


QUIET = [
    "--seed_everything=false",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.accelerator=cpu",
]
