"""The drawings of the documentation: `python docs/pictures.py` writes them to `docs/images/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

IMAGES = Path(__file__).parent / "images"
BLUE, VERMILION, GREEN, ORANGE, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#8A8A8A",
)
INK = "#222222"
Point = tuple[float, float]


def box(
    axes: Axes,
    at: Point,
    text: str,
    colour: str,
    size: Point = (0.86, 0.62),
    font: float = 12,
    fill: str = "white",
) -> None:
    """Draw text in a rounded box around a point."""
    (x, y), (width, height) = at, size
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch(
            corner, width, height, boxstyle=style, ec=colour, fc=fill, lw=1.6, zorder=2
        )
    )
    axes.text(
        x,
        y,
        text,
        ha="center",
        va="center",
        fontsize=font,
        color=INK,
        zorder=3,
        linespacing=1.35,
    )


def arrow(
    axes: Axes,
    start: Point,
    end: Point,
    colour: str = GREY,
    width: float = 1.4,
    bend: float = 0.0,
    dashed: bool = False,
) -> None:
    style = "-|>,head_length=5,head_width=2.6"
    line = (0, (3, 2)) if dashed else "-"
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle=style,
            color=colour,
            lw=width,
            ls=line,
            connectionstyle=f"arc3,rad={bend}",
            shrinkA=0,
            shrinkB=0,
            zorder=1 if colour == GREY else 4,
        )
    )


def canvas(axes: Axes, width: Point, height: Point) -> None:
    axes.set(xlim=width, ylim=height, aspect="equal")
    axes.axis("off")


# --- One outer step ---


def levels() -> plt.Figure:
    """Draw an inner run of three steps, the parameters it reads, and the two losses."""
    figure, axes = plt.subplots(figsize=(9.6, 3.9))
    canvas(axes, (-0.75, 12.1), (-1.3, 3.45))
    theta = [(0.0, 0.6), (2.6, 0.6), (5.2, 0.6), (8.6, 0.6)]
    names = [r"$\theta_0$", r"$\theta_1$", r"$\theta_2$", r"$\theta_T$"]
    phi, outer = (4.6, 2.7), (11.1, 0.6)
    for at, name in zip(theta, names, strict=True):
        box(axes, at, name, BLUE, font=15)
    box(axes, phi, r"$\varphi$", VERMILION, font=16)
    box(axes, outer, r"$f(\theta_T,\varphi)$", VERMILION, size=(1.75, 0.72), font=13)
    for left, right in ((0, 1), (1, 2)):
        arrow(
            axes, (theta[left][0] + 0.45, 0.6), (theta[right][0] - 0.45, 0.6), BLUE, 2
        )
    arrow(axes, (5.65, 0.6), (6.35, 0.6), BLUE, 2)
    axes.text(6.9, 0.6, r"$\cdots$", ha="center", va="center", fontsize=18, color=BLUE)
    arrow(axes, (7.45, 0.6), (8.15, 0.6), BLUE, 2)
    arrow(axes, (9.05, 0.6), (10.2, 0.6), VERMILION, 2)
    for target, dashed in (
        (0.25, True),
        (1.3, False),
        (3.9, False),
        (7.8, False),
        (10.85, False),
    ):
        arrow(
            axes,
            (phi[0], 2.37),
            (target, 0.98 if target not in (1.3, 3.9, 7.8) else 0.68),
            VERMILION,
            1.2,
            0,
            dashed,
        )
    for x, batch in ((1.3, 1), (3.9, 2), (7.8, "T")):
        axes.text(
            x,
            0.2,
            rf"$\nabla_\theta\, g(\theta,\varphi;\,x_{batch})$",
            ha="center",
            va="top",
            fontsize=11,
            color=BLUE,
        )
    axes.text(
        11.1, 0.1, "outer batch", ha="center", va="top", fontsize=11, color=VERMILION
    )
    axes.text(5.15, 2.86, "outer parameters", va="center", fontsize=11, color=VERMILION)
    axes.text(-0.45, 1.75, r"start $\Omega_0(\varphi)$", fontsize=11, color=VERMILION)
    bracket = -0.55
    axes.plot([-0.4, 9.0], [bracket, bracket], color=BLUE, lw=1.4)
    text = r"inner run: $T$ steps of the inner optimizer, $\theta_t = \Omega_t(\theta_{t-1}, \varphi)$"
    axes.text(4.3, bracket - 0.15, text, ha="center", va="top", fontsize=12, color=BLUE)
    return figure


# --- What the strategies differentiate ---


def estimates() -> plt.Figure:
    """Draw one inner run for each family, with what it differentiates."""
    families: dict[str, Callable[[Axes], None]] = {
        "Reverse: the whole run, backward": _reverse,
        "Truncated: the last K steps": _truncated,
        "Forward: along directions, with the run": _forward,
        "Implicit: the inner loss at the end": _implicit,
        "Perturbation: runs at other outer parameters": _perturbation,
        "Greedy: the direct effect of every step": _greedy,
    }
    figure, grid = plt.subplots(3, 2, figsize=(9.4, 7.4), constrained_layout=True)
    for axes, (title, draw) in zip(grid.flat, families.items(), strict=True):
        canvas(axes, (-0.75, 7.55), (-1.5, 1.65))
        axes.set_title(title, fontsize=12, color=INK, pad=4)
        draw(axes)
    return figure


POSITIONS = [0.0, 1.75, 3.5, 5.25]


def _run(axes: Axes, y: float = 0.0, colour: str = BLUE) -> None:
    for x, name in zip(POSITIONS, (0, 1, 2, "T"), strict=True):
        box(axes, (x, y), rf"$\theta_{name}$", colour, size=(0.8, 0.62))
    for left, right in zip(POSITIONS, POSITIONS[1:], strict=False):
        arrow(axes, (left + 0.42, y), (right - 0.42, y))
    box(axes, (6.95, y), "$f$", VERMILION, size=(0.7, 0.62))
    arrow(axes, (5.67, y), (6.58, y))


def _note(axes: Axes, text: str) -> None:
    axes.text(3.4, -1.45, text, ha="center", va="bottom", fontsize=10.5, color=INK)


def _back(axes: Axes, steps: int) -> None:
    arrow(axes, (6.9, -0.36), (5.3, -0.36), VERMILION, 2, -0.35)
    for right, left in list(zip(POSITIONS[::-1], POSITIONS[-2::-1], strict=False))[
        :steps
    ]:
        arrow(axes, (right - 0.05, -0.36), (left + 0.05, -0.36), VERMILION, 2, -0.35)


def _reverse(axes: Axes) -> None:
    _run(axes)
    _back(axes, 3)
    _note(axes, "exact; memory grows with T")


def _truncated(axes: Axes) -> None:
    _run(axes)
    _back(axes, 1)
    _note(axes, "biased where early steps matter")


def _forward(axes: Axes) -> None:
    _run(axes)
    for left, right in zip([*POSITIONS], [*POSITIONS[1:], 6.95], strict=True):
        for bend, colour in ((-0.35, GREEN), (-0.6, ORANGE)):
            arrow(axes, (left + 0.05, 0.36), (right - 0.05, 0.36), colour, 1.8, bend)
    axes.text(0.15, 0.78, "$v_1$", fontsize=12, color=GREEN, ha="right")
    axes.text(0.15, 1.15, "$v_2$", fontsize=12, color=ORANGE, ha="right")
    _note(axes, "unbiased, or exact along every axis; memory flat in T")


def _implicit(axes: Axes) -> None:
    _run(axes)
    arrow(axes, (6.9, -0.36), (5.3, -0.36), VERMILION, 2, -0.35)
    box(
        axes,
        (5.25, 1.15),
        r"$H^{-1}\,\partial^2_{\theta\varphi}\, g$",
        VERMILION,
        size=(2.1, 0.66),
        font=11,
    )
    arrow(axes, (5.25, 0.34), (5.25, 0.8), VERMILION, 2)
    _note(axes, "exact at the inner minimum; no graph of the run")


def _perturbation(axes: Axes) -> None:
    _run(axes, -0.35)
    for x in POSITIONS[1:]:
        axes.plot(x, 0.95, "o", color=GREEN, ms=9)
    axes.plot(0.0, 0.35, "o", color=GREEN, ms=5)
    path = [(0.0, 0.35), (1.75, 0.95), (3.5, 0.95), (5.25, 0.95), (6.95, 0.1)]
    for (x0, y0), (x1, y1) in zip(path, path[1:], strict=False):
        arrow(
            axes,
            (x0 + 0.12, y0 + (0.04 if y1 > y0 else 0)),
            (x1 - 0.14, y1 - (0.04 if y1 > y0 else -0.06)),
            GREEN,
            1.8,
        )
    axes.text(
        3.5, 1.25, r"run at $\varphi + \mu v$", fontsize=11, color=GREEN, ha="center"
    )
    _note(axes, "no derivative of the run: black boxes too")


def _greedy(axes: Axes) -> None:
    _run(axes)
    for weight, x in zip((r"$\gamma^2$", r"$\gamma$", "1"), POSITIONS[1:], strict=True):
        box(axes, (x, 1.2), "$f$", VERMILION, size=(0.62, 0.5), font=11)
        arrow(axes, (x, 0.93), (x, 0.36), VERMILION, 2)
        axes.text(x + 0.42, 1.2, weight, fontsize=11, color=VERMILION, va="center")
    _note(axes, "biased; one pass, memory flat in T")


# --- A decision ---


def decision() -> plt.Figure:
    """Draw questions, and the strategy that each answer leads to."""
    figure, axes = plt.subplots(figsize=(10.4, 7.4))
    canvas(axes, (-0.2, 15.2), (-1.0, 10.0))
    questions = [
        (
            "Can autograd go through\nyour inner solver or steps?",
            "no",
            "PZOBO, ZerothOrder\nImplicitGradient, if you have g",
            GREEN,
        ),
        (
            "Does the graph of all T steps fit,\nor of √T of them?",
            "yes",
            'ReverseUnroll\nReverseUnroll(checkpoint="sqrt")',
            BLUE,
        ),
        (
            "Only a handful of outer parameters,\nsay at most 50?",
            "yes",
            "ForwardUnroll",
            BLUE,
        ),
        (
            "Does the inner run end near a minimum\nthat moves with the outer parameters?",
            "yes",
            "ImplicitGradient",
            ORANGE,
        ),
        (
            "Do the outer parameters act\nwithin the last few steps?",
            "yes",
            "TruncatedReverse, GammaGreedy",
            ORANGE,
        ),
    ]
    top, gap, left, right = 9.2, 1.78, 4.0, 12.0
    for number, (question, answer, strategy, colour) in enumerate(questions):
        y = top - gap * number
        box(
            axes, (left, y), question, GREY, size=(7.2, 1.12), font=11.5, fill="#FAFAFA"
        )
        box(axes, (right, y), strategy, colour, size=(5.6, 1.02), font=11.5)
        arrow(axes, (left + 3.6, y), (right - 2.8, y), INK, 1.5)
        axes.text(
            left + 4.4,
            y + 0.12,
            answer,
            ha="center",
            va="bottom",
            fontsize=11,
            color=INK,
        )
        other = "no" if answer == "yes" else "yes"
        arrow(axes, (left, y - 0.56), (left, y - gap + 0.56), INK, 1.5)
        axes.text(left + 0.15, y - gap / 2, other, va="center", fontsize=11, color=INK)
    y = top - gap * len(questions)
    box(
        axes,
        (left, y),
        "ForwardGradient\nwith a guide, where a biased one is near",
        GREEN,
        (7.2, 1.12),
        11.5,
    )
    legend = (
        (BLUE, "exact"),
        (GREEN, "unbiased, or nearly; noisy"),
        (ORANGE, "biased, no noise"),
    )
    for number, (colour, text) in enumerate(legend):
        at = (9.6, y + 0.45 - 0.55 * number)
        box(axes, at, "", colour, size=(0.5, 0.32))
        axes.text(at[0] + 0.45, at[1], text, va="center", fontsize=11, color=INK)
    return figure


PICTURES = {
    "concepts_levels": levels,
    "concepts_estimates": estimates,
    "choosing": decision,
}


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with plt.rc_context({"mathtext.fontset": "cm", "font.family": "DejaVu Sans"}):
        for name, draw in PICTURES.items():
            figure = draw()
            figure.savefig(
                IMAGES / f"{name}.png",
                dpi=150,
                bbox_inches="tight",
                pad_inches=0.1,
                facecolor="white",
            )
            plt.close(figure)


if __name__ == "__main__":
    main()
