"""Digits by scikit-learn in the form in which benchopt's bilevel benchmark keeps MNIST, which it would download."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

SHIFTS = (-2, -1, 0, 1, 2)


def write_mnist(path: Path, held_out: int = 360) -> None:
    """Write ``mnist.pkl``: 8×8 digits, drawn as 24×24 at 25 places of 28×28; those of the test set are others."""
    found = load_digits()
    order = np.random.RandomState(0).permutation(len(found.images))
    images, labels = drawn(found.images[order]), found.target[order].astype("int64")
    test, training = slice(held_out), slice(held_out, None)
    data = {
        "training_images": np.concatenate([moved(images[training], a, b) for a in SHIFTS for b in SHIFTS]),
        "training_labels": np.tile(labels[training], len(SHIFTS) ** 2),
        "test_images": images[test].reshape(held_out, -1),
        "test_labels": labels[test],
    }
    path.write_bytes(pickle.dumps(data))


def drawn(images: np.ndarray) -> np.ndarray:
    large = np.kron(images * (255 / 16), np.ones((1, 3, 3)))
    return np.pad(large, ((0, 0), (2, 2), (2, 2))).astype("uint8")


def moved(images: np.ndarray, down: int, right: int) -> np.ndarray:
    return np.roll(images, (down, right), axis=(1, 2)).reshape(len(images), -1)
