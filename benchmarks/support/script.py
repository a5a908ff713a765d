"""The command line of a benchmark, and what holds while one runs."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

import torch


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose ``--help`` shows the first lines of a script as they are written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def begin(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; from here on torch has one thread, and Lightning speaks of errors only."""
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    return args
