"""The picture of `data_cleaning.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import report


def draw(
    path: Path,
    title: str,
    data: Any,
    logits: Tensor,
    curves: Mapping[str, tuple[list[int], list[float]]],
    accuracy: Mapping[str, float],
) -> None:
    """Draw the weights, the curves and the most suspicious images.

    Args:
        path: of the file.
        title: of the picture.
        data: the `CleaningData` of the run.
        logits: (n,), of the weights that were learned.
        curves: what was logged: by name, steps and values.
        accuracy: on the test examples, of the nets that lines are drawn for: "clean only" and "noisy".
    """
    figure = Figure(figsize=(11, 6.6))
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    weights, bins = logits.sigmoid(), torch.linspace(0, 1, 31).tolist()
    top_left.hist(weights[~data.is_wrong].tolist(), bins, color=report.BLUE, alpha=0.75, label="label right")
    top_left.hist(weights[data.is_wrong].tolist(), bins, color=report.VERMILION, alpha=0.75, label="label wrong")
    top_left.set(title="What the run learned about each label", xlabel="weight", ylabel="training examples")
    top_left.legend()

    top_right.plot(*curves["outer_loss"], color=report.BLUE)
    top_right.set(title="Loss on the validation examples", xlabel="outer step", ylabel="cross-entropy")

    percent = [100 * value for value in curves["test_accuracy"][1]]
    bottom_left.plot(curves["test_accuracy"][0], percent, color=report.BLUE, label="during the run")
    lines = {"clean only": (report.GREEN, "right labels only"), "noisy": (report.VERMILION, "all labels alike")}
    for name, (color, label) in lines.items():
        bottom_left.axhline(100 * accuracy[name], color=color, ls="--", lw=1.5, label=label)
    bottom_left.set(title="Test accuracy", xlabel="outer step", ylabel="%")
    bottom_left.legend(loc="lower right")

    x, y, _ = data.train.tensors
    side = round(x[0].numel() ** 0.5)
    worst = logits.argsort()[:18].view(3, 6)
    sheet = torch.cat([torch.cat([F.pad(x[i].view(side, side), (1, 1, 1, 1)) for i in row], 1) for row in worst])
    bottom_right.imshow(sheet.numpy(), cmap="gray_r")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for i, example in enumerate(worst.flatten().tolist()):
        spot = ((i % 6) * (side + 2) + 0.8, (i // 6) * (side + 2) + 0.6)
        bottom_right.text(*spot, str(y[example].item()), color=report.VERMILION, va="top", size=12, bbox=box)
    bottom_right.set(title="The most suspicious examples, with their given labels")
    bottom_right.set_axis_off()

    figure.suptitle(title, x=0.01, ha="left", size=14)
    figure.savefig(path)
