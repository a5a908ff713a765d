"""The loaders that the examples share."""

import gzip
import struct

import numpy as np
import pytest
import torch

from image_data import MNIST_FILES, load_digits, load_mnist


def idx(array):
    """Return the bytes of an idx file."""
    return b"\0\0\x08" + struct.pack(f">B{array.ndim}I", array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = [(3, 28, 28), (3,), (2, 28, 28), (2,)]
    return {
        name: rng.integers(256, size=shape, dtype=np.uint8) for name, shape in zip(MNIST_FILES, shapes, strict=True)
    }


@pytest.mark.parametrize("compressed", [False, True])
def test_mnist_is_read_as_written(tmp_path, arrays, compressed):
    for name, array in arrays.items():
        path = tmp_path / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(idx(array)) if compressed else idx(array))
    split = load_mnist(tmp_path)
    for got, array in zip(split, arrays.values(), strict=True):
        scale = 255 if array.ndim == 3 else 1
        assert got.dtype == (torch.float32 if array.ndim == 3 else torch.int64)
        np.testing.assert_allclose(got.numpy() * scale, array, rtol=1e-6)


def test_missing_files_are_named(tmp_path, arrays):
    for name in MNIST_FILES[:3]:
        (tmp_path / name).write_bytes(idx(arrays[name]))
    message = r"Expected `.*` to have the files train-images.*with \.gz\. Missing: t10k-labels-idx1-ubyte\.$"
    with pytest.raises(FileNotFoundError, match=message):
        load_mnist(tmp_path)


@pytest.mark.parametrize(
    "spoil", [lambda content: content[:-1], lambda content: content + b"\0", lambda content: content[:6]]
)
def test_a_file_of_the_wrong_length_is_refused(tmp_path, arrays, spoil):
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(spoil(idx(array)))
    with pytest.raises(
        ValueError, match=r"Expected `.*train-images-idx3-ubyte` to be an idx file of \d+ bytes, got \d+"
    ):
        load_mnist(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0\0\x0d\x01\0\0\0\0", b"<html>"])
def test_a_file_that_is_not_idx_is_refused(tmp_path, content):
    for name in MNIST_FILES:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"Expected `.*` to be an idx file of unsigned bytes, got one that starts b"):
        load_mnist(tmp_path)


def test_digits_are_scaled_shuffled_and_split():
    split = load_digits(seed=1)
    assert [tuple(part.shape) for part in split] == [(1300, 64), (1300,), (497, 64), (497,)]
    assert split.train_x.dtype == torch.float32
    assert split.train_x.min() == 0
    assert split.train_x.max() == 1


def test_the_order_of_digits_depends_on_the_seed_only():
    first, again, other = (load_digits(seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.train_x, other.train_x)


def test_digits_are_all_there_with_their_labels():
    def rows(split):
        images = torch.cat([split.train_x, split.test_x])
        labels = torch.cat([split.train_y, split.test_y])
        return torch.cat([images, labels[:, None]], dim=1).unique(dim=0)

    assert torch.equal(rows(load_digits(seed=1)), rows(load_digits(seed=2)))
