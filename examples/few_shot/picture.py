"""The figure of a run: the score while training, the adaptation curve, and one held-out task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import report
from few_shot.learners import FewShotRegressor, MetaLearner
from lightning_bilevel import Episode

LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}


def draw(name: str, module: MetaLearner, results: Mapping[str, Any], task: Episode, path: Path) -> Path:
    """Draw and return the file."""
    regression = isinstance(module, FewShotRegressor)
    unit, label = (1, "squared error") if regression else (100, "accuracy, %")
    figure = Figure(figsize=(11, 3.8))
    left, middle, right = figure.subplots(1, 3)
    if results["during the run"]:
        steps, values = results["during the run"]
        left.plot(steps, [unit * value for value in values], color=report.BLUE)
    left.set(title="Held-out tasks during the run", xlabel="outer step", ylabel=label)

    curve = results["curve"]
    means, halves = ([unit * value for value in curve[key]] for key in ("mean", "95%"))
    low, high = zip(*((mean - half, mean + half) for mean, half in zip(means, halves, strict=True)), strict=True)
    middle.fill_between(curve["steps"], low, high, color=report.BLUE, alpha=0.2, lw=0, label="95% interval")
    middle.plot(curve["steps"], means, color=report.BLUE, marker="o", ms=4)
    middle.set(
        title="Adaptation to a held-out task", xlabel="inner steps", ylabel=label, ylim=(0, None if regression else 102)
    )
    middle.legend(loc="best")
    (draw_fit if regression else draw_support)(right, module, task)
    figure.suptitle(f"{name} with `{results['strategy']}` on {results['data']}", x=0.01, ha="left", size=13)
    figure.savefig(path)
    return path


def draw_fit(axes: Axes, module: MetaLearner, task: Episode) -> None:
    """The function before and after adaptation to ten points."""
    (support,) = task.inner
    x = torch.linspace(-5, 5, 200)[:, None]
    order = task.outer[0].flatten().argsort()
    axes.plot(task.outer[0].flatten()[order], task.outer[1].flatten()[order], color=report.GREEN, label="truth")
    for steps, style in ((0, ":"), (1, "--"), (10, "-")):
        label = f"after {steps} step{'' if steps == 1 else 's'}"
        with torch.no_grad(), module.adapted(task.inner, steps=steps):
            axes.plot(x.flatten(), module.net(x).flatten(), color=report.BLUE, ls=style, label=label)
    axes.plot(*(each.flatten() for each in support), "o", color=report.VERMILION, label="support")
    low, high = axes.get_ylim()
    axes.set(title="One of them", xlabel="x", ylabel="y", ylim=(low, high + 0.4 * (high - low)))  # room for the legend
    axes.legend(loc="upper center", ncols=2, handlelength=1.6, columnspacing=1)


def draw_support(axes: Axes, module: MetaLearner, task: Episode) -> None:
    """Support images in the first row; below, query images with the class that was found, wrong ones in red."""
    ((x, y),), (query, truth) = task.inner, task.outer
    with torch.no_grad(), module.adapted(task.inner, steps=module.test_steps):
        found = module.net(query).argmax(-1)
    ways = int(y.max()) + 1
    first = [int((y == way).nonzero()[0]) for way in range(ways)]
    rows = [x[first]]
    names = [[str(way) for way in range(ways)]]
    shown = min(3, int((truth == 0).sum()))
    colors = [[report.GREY] * ways]
    for row in range(shown):
        where = [int((truth == way).nonzero()[row]) for way in range(ways)]
        rows.append(query[where])
        names.append([str(int(found[i])) for i in where])
        colors.append([report.GREEN if found[i] == truth[i] else report.VERMILION for i in where])
    sheet = torch.cat(
        [torch.cat([torch.nn.functional.pad(image, (1,) * 4, value=0.15) for image in row], -1) for row in rows], -2
    )
    sheet = sheet / sheet.max()
    axes.imshow(sheet[0].numpy() if len(sheet) == 1 else sheet.permute(1, 2, 0).numpy(), cmap="gray_r")
    side = x.shape[-1] + 2
    for row, (words, inks) in enumerate(zip(names, colors, strict=True)):
        for column, (word, ink) in enumerate(zip(words, inks, strict=True)):
            spot = ((column + 0.08) * side, (row + 0.08) * side)
            axes.text(*spot, word, color=ink, va="top", size=10, weight="bold", bbox=LABEL)
    axes.set(title="One: support, and queries as they were read")
    axes.set_axis_off()
