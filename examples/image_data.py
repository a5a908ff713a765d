"""Images of digits for the examples, as tensors."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sklearn.datasets
import torch
from torch import Tensor

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class Split(NamedTuple):
    """Images (n, ...) as float32 in [0, 1] and labels (n,) as int64, for training and for testing."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits(seed: int = 0, num_test: int = 497) -> Split:
    """Return scikit-learn's 1,797 digits, images (n, 64), in an order drawn from ``seed``.

    They come with scikit-learn: nothing is downloaded.
    """
    bunch = sklearn.datasets.load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(bunch.data, dtype=torch.float32)[order] / 16  # counts of ink, 0 to 16
    y = torch.tensor(bunch.target, dtype=torch.int64)[order]
    return Split(x[num_test:], y[num_test:], x[:num_test], y[:num_test])


def load_mnist(folder: str | Path) -> Split:
    """Return MNIST, images (60000, 28, 28) and (10000, 28, 28), from its four files in ``folder``.

    Raises:
        FileNotFoundError: one of them is there neither as it is nor with ``.gz``.
        ValueError: one of them is not an idx file of bytes, or is cut short.
    """
    train_x, train_y, test_x, test_y = (torch.from_numpy(read_idx(path)) for path in find_mnist(Path(folder)))
    return Split(train_x.float() / 255, train_y.long(), test_x.float() / 255, test_y.long())


def find_mnist(folder: Path) -> list[Path]:
    """Return the paths of ``MNIST_FILES``; see :func:`load_mnist`."""
    choices = {name: (folder / name, folder / f"{name}.gz") for name in MNIST_FILES}
    missing = [name for name, paths in choices.items() if not any(path.is_file() for path in paths)]
    if missing:
        raise FileNotFoundError(
            f"Expected `{folder}` to have the files {', '.join(MNIST_FILES)}, each as it is or with .gz. "
            f"Missing: {', '.join(missing)}."
        )
    return [plain if plain.is_file() else compressed for plain, compressed in choices.values()]


def read_idx(path: Path) -> np.ndarray:
    """Return the array of bytes in an idx file, which may be compressed.

    The file is two zero bytes, the type (8: unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit integer, then the entries in C order.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"Expected `{path}` to be an idx file of unsigned bytes, got one that starts {content[:4]!r}.")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start].ljust(start - 4, b"\0"), dtype=">u4").tolist()
    size = start + math.prod(shape)
    if len(content) != size:
        raise ValueError(f"Expected `{path}` to be an idx file of {size} bytes, got {len(content)}.")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()
