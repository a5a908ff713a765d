"""CIFAR-100 from its standard pickle files, 32×32 in three colours."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILES = ("train", "test")


def load_cifar100(folder: str | Path) -> tuple[Tensor, Tensor]:
    """Return all images (60000, 3, 32, 32) in [0, 1], those for training and for testing, and fine labels (60000,).

    Few-shot learning splits by class and has no use for the split by image.

    Args:
        folder: has the files ``train`` and ``test`` of the Python version, or a folder ``cifar-100-python`` that has.
            They are pickles, which run code when opened: take them from a source that you trust.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file holds something else.
    """
    places = [Path(folder), Path(folder) / "cifar-100-python"]
    place = next((each for each in places if all((each / name).is_file() for name in FILES)), None)
    if place is None:
        raise FileNotFoundError(f"Expected `{places[0]}` or `{places[1]}` to have the files train and test.")
    parts = [read(place / name) for name in FILES]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Return the images and fine labels of one file."""
    with path.open("rb") as file:
        content = pickle.load(file, encoding="bytes")
    try:
        pixels, labels = np.asarray(content[b"data"]), torch.tensor(content[b"fine_labels"])
    except (KeyError, TypeError):
        raise ValueError(f"Expected `{path}` to be a pickle with b'data' and b'fine_labels'.") from None
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
        raise ValueError(f"Expected b'data' in `{path}` to be (n, 3072) bytes, got {pixels.shape} of {pixels.dtype}.")
    return torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32).float() / 255, labels
