"""What the weights look like on a passage, and what the adapted models know along the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import report

LINE = 100
"""Characters in a line of a drawn passage."""

DARKEST = 0.75
"""Place in the colour map of the largest weight."""

COLORS = {
    "uniform": report.VERMILION,
    "IDF": "#E69F00",
    "TF-IDF": "#CC79A7",
    "learned": report.BLUE,
    "oracle": report.GREEN,
}


class WeightedToken(NamedTuple):
    """A token as text, its weight, and whether it states a fact."""

    text: str
    weight: float
    is_fact: bool


def draw_weights(path: Path, title: str, passages: Sequence[Sequence[WeightedToken]], most_lines: int = 12) -> Path:
    """Draw passages with each token on a ground as dark as its weight; facts are underlined."""
    top = max(token.weight for passage in passages for token in passage)
    places = [_laid_out(passage) for passage in passages]
    heights = [min(lines, most_lines) for _, lines in places]
    rows = sum(heights) + 0.7 * (len(passages) - 1)
    figure = Figure(figsize=(11, 0.9 + 0.3 * rows))
    axes = figure.subplots()
    colors = matplotlib.colormaps["Blues"]
    y = 0.0
    for passage, (spots, _), height in zip(passages, places, heights, strict=True):
        for token, (line, column) in zip(passage, spots, strict=True):
            if line >= height:
                break
            shade = DARKEST * token.weight / top
            start = column + len(token.text) - len(token.text.lstrip())
            axes.add_patch(Rectangle((start, y + line), len(token.text.lstrip()), 0.84, color=colors(shade), lw=0))
            ink = "white" if shade > 0.5 else "black"
            axes.text(
                start, y + line + 0.43, token.text.lstrip(), family="monospace", size=12.2, va="center", color=ink
            )
            if token.is_fact:
                axes.plot([start, column + len(token.text)], [y + line + 0.88] * 2, color=report.VERMILION, lw=2)
        y += height + 0.7
    axes.set(xlim=(0, LINE + 2), ylim=(rows, -0.1), title=title)
    axes.set_axis_off()
    shown = matplotlib.colors.LinearSegmentedColormap.from_list("shown", colors(torch.linspace(0, DARKEST, 64).numpy()))
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, top), shown)
    bar = figure.colorbar(scale, ax=axes, pad=0.01, fraction=0.02, aspect=12, ticks=[0, top / 2, top], format="%.2f")
    bar.set_label("weight")
    bar.outline.set_visible(False)
    figure.savefig(path)
    return path


def draw_gain(path: Path, gains: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Path:
    """Draw, for each weighting, the gain in answer NLL on the documents read so far."""
    figure = Figure(figsize=(7.4, 4.2))
    axes = figure.subplots()
    for name, (documents, values) in gains.items():
        axes.plot(documents, values, color=COLORS[name], marker="o", ms=4, label=f"{name} weights")
    axes.axhline(0, color=report.GREY, lw=1, ls="--")
    axes.set(
        title="What the model has learned along the stream",
        xlabel="documents read, one step each",
        ylabel="gain in answer NLL (nats per token)\non the documents read so far",
    )
    axes.legend()
    figure.savefig(path)
    return path


def _laid_out(passage: Sequence[WeightedToken]) -> tuple[list[tuple[int, int]], int]:
    """Return the line and column of each token, and the number of lines; words are kept together."""
    words: list[list[Any]] = []
    for token in passage:
        if words and not token.text.startswith(" "):
            words[-1].append(token)
        else:
            words.append([token])
    spots, line, column = [], 0, 0
    for word in words:
        length = sum(len(token.text) for token in word)
        if column and column + length > LINE:
            line, column = line + 1, 0
        for token in word:
            spots.append((line, column))
            column += len(token.text)
    return spots, line + 1
