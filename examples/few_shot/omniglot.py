"""Omniglot from two npz files, 28×28."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FILES = {"train": "images_background.npz", "test": "images_evaluation.npz"}


def load_omniglot(folder: str | Path, part: str, size: int = 28) -> tuple[Tensor, Tensor]:
    """Return images (n, 1, size, size), ink 1 and paper 0, and the numbers (n,) of their characters.

    Args:
        folder: has the npz files, or a folder ``omniglot`` that has; each holds one array of booleans
            (characters, drawers, 105, 105) in which ink is False.
        part: ``"train"``, the 964 background characters, or ``"test"``, the 659 evaluation characters.
        size: pixels on a side.

    Raises:
        FileNotFoundError: the file of that part is not there.
    """
    places = [Path(folder) / FILES[part], Path(folder) / "omniglot" / FILES[part]]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"Expected `{places[0]}` or `{places[1]}`, got neither.")
    with np.load(path) as arrays:
        drawings = arrays[arrays.files[0]]
    characters, drawers = drawings.shape[:2]
    ink = (~drawings.reshape(-1, *drawings.shape[2:])).astype(np.uint8) * 255
    small = np.stack([np.asarray(Image.fromarray(each).resize((size, size), Image.Resampling.LANCZOS)) for each in ink])
    labels = torch.arange(characters).repeat_interleave(drawers)
    return torch.from_numpy(small)[:, None].float() / 255, labels
