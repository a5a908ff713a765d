"""Find the wrong labels of a training set, from a file of settings: Lightning's command line on the same problem.

The module and the data are those of data_cleaning.py. Which hypergradient strategy runs, with which solver, schedule
or directions, is an entry among the callbacks of a YAML file; every option of the Trainer, the module and the data can
be there too, or follow on the command line:

    python examples/data_cleaning_cli.py fit --config examples/configs/schedule.yaml
    python examples/data_cleaning_cli.py fit --config examples/configs/forward_gradient.yaml --model.inner_steps 20
    python examples/data_cleaning_cli.py fit --config examples/configs/schedule.yaml --ckpt_path FILE.ckpt
    python examples/data_cleaning_cli.py validate --config examples/configs/forward_gradient.yaml --ckpt_path FILE.ckpt
    python examples/data_cleaning_cli.py fit --trainer.callbacks.help ForwardGradient
    python examples/data_cleaning_cli.py fit --config examples/configs/schedule.yaml --print_config

A fit writes its log, its checkpoints and its whole configuration below `outputs/cleaning`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from data_cleaning import CleaningData, DataCleaning


class CleaningCLI(LightningCLI):
    """Lightning's command line; the sizes of the module follow from the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments(("data.data_dir", "data.num_train"), "model.num_examples", num_examples)
        parser.link_arguments("data.data_dir", "model.num_pixels", num_pixels)


def num_examples(data_dir: str | Path | None, num_train: int | None) -> int:
    """Return how many training examples `CleaningData` takes: each has a weight."""
    return num_train or (5000 if data_dir else 900)


def num_pixels(data_dir: str | Path | None) -> int:
    """Return the pixels of an image of MNIST, or of a scikit-learn digit."""
    return 28 * 28 if data_dir else 8 * 8


def run(argv: Sequence[str] | None = None) -> LightningCLI:
    """Do what the command line says; return what it made."""
    return CleaningCLI(DataCleaning, CleaningData, seed_everything_default=0, args=argv)


if __name__ == "__main__":
    run()
