"""Draw docs/pictures/idea.svg: what is frozen, what a router switches, what each stage moves.

    python docs/pictures/make_idea.py [FILE]     # another ending, say .png, for a look at it

In the spirit of Figure 2 of the paper; the prefix (keys and values) is ours, see docs/training.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
matplotlib.rcParams.update({"svg.hashsalt": "mp2", "svg.fonttype": "path", "font.family": "DejaVu Sans"})

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

GREY, DARK, ON, OFF, FUSED, STAGE = "#e4e7eb", "#1f2933", "#f6a821", "#ffffff", "#d64545", "#2680c2"
ROUTER = (1, 0, 1, 0, 0, 1, 0, 0)  # K = 8 modules, three are on


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str = "", **style: object) -> None:
    """A rounded box with its lower left corner at x, y, and a text in its middle."""
    size = style.pop("size", 10)
    colour = style.pop("ink", DARK)
    options = {"facecolor": GREY, "edgecolor": "#7b8794", "linewidth": 1.0, **style}
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.6", **options))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=colour)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    """An arrow from start to end."""
    options = {"arrowstyle": "-|>", "mutation_scale": 12, "linewidth": 1.4, "color": DARK, **style}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **options))


def encoder(axes: Axes) -> None:
    """Left: the frozen encoder, its input and its answer."""
    axes.text(17, 57.2, "frozen encoder", ha="center", fontsize=12, fontweight="bold", color=DARK)
    box(axes, 2, 1, 30, 5, "[CLS] text, question, options [SEP]", facecolor="#ffffff")
    for y, name in ((11, "layer 1"), (25.5, r"layer $\ell$"), (40, "layer $L$")):
        marked = "ell" in name
        box(axes, 4, y, 26, 7, name, size=11, linewidth=2.2 if marked else 1.0)
    for y in (6, 18, 32.5):
        arrow(axes, (17, y), (17, y + (5 if y == 6 else 7.5)))
    for y in (21.75, 36.25):
        axes.text(19, y, "...", fontsize=11, color=DARK, va="center")
    arrow(axes, (17, 47), (17, 50))
    box(axes, 2, 50, 30, 5, "span head: where the answer stands", facecolor="#ffffff")


def layer(axes: Axes) -> None:
    """Right, above: modules, router, fused prompt, keys and values of one layer."""
    axes.text(
        71, 57.2, r"the prompt of layer $\ell$", ha="center", fontsize=12, fontweight="bold", color=DARK
    )
    axes.text(41, 53.2, "K modules, pre-trained on many tasks", fontsize=10, color=DARK, va="center")
    axes.text(41, 42.2, "router: which are on", fontsize=10, color=DARK, va="center")
    for k, on in enumerate(ROUTER):
        x = 41 + 7.2 * k
        box(axes, x, 46, 5.6, 4.6, f"$z_{k + 1}$", facecolor=ON if on else OFF, size=11)
        box(
            axes,
            x,
            35.6,
            5.6,
            4.2,
            str(on),
            facecolor="#ffffff",
            edgecolor=STAGE,
            ink=STAGE if on else "#9aa5b1",
            size=11,
        )
        if on:
            arrow(axes, (x + 2.8, 35.6), (69, 31.6), color="#9aa5b1", linewidth=1.0, mutation_scale=8)
    box(axes, 55, 25.5, 28, 6, "", facecolor="#fdeaea", edgecolor=FUSED, linewidth=1.8)
    axes.text(
        69,
        28.5,
        r"fused prompt $z=\frac{1}{K}\,\sum_k\,w_k z_k$",
        ha="center",
        va="center",
        fontsize=11,
        color=DARK,
    )
    arrow(axes, (55, 28.5), (30.4, 28.5), color=FUSED, linewidth=2.0)
    axes.text(42.8, 31.3, "$p = zA$, as keys", ha="center", va="center", fontsize=10, color=FUSED)
    axes.text(42.8, 25.6, "and values", ha="center", va="center", fontsize=10, color=FUSED)


def stages(axes: Axes) -> None:
    """Right, below: what each stage moves."""
    for x, name, colour, fill, lines in (
        (
            37,
            "Stage I",
            STAGE,
            "#eaf4fc",
            "search the routers, every layer's 0s and 1s\n(prompts stay as they are)",
        ),
        (
            69,
            "Stage II",
            FUSED,
            "#fdeaea",
            "CMA-ES moves the fused prompts,\none layer after another (routers stay)",
        ),
    ):
        box(axes, x, 8.6, 30, 12, "", facecolor=fill, edgecolor=colour, linewidth=1.4)
        axes.text(x + 1.4, 18, name, fontsize=11, fontweight="bold", color=colour, va="center")
        axes.text(x + 1.4, 12.6, lines, fontsize=9.2, color=DARK, va="center", linespacing=1.35)
    arrow(axes, (67, 14.6), (69, 14.6))
    note = "each step: one forward over 32 examples gives one loss; no backward pass"
    axes.text(68, 4, note, ha="center", va="center", fontsize=10, color=DARK, style="italic")


def main(path: Path) -> None:
    """Draw the picture."""
    figure = pyplot.figure(figsize=(10.2, 6.1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 101), ylim=(0, 60.4))
    axes.axis("off")
    encoder(axes)
    layer(axes)
    stages(axes)
    figure.savefig(
        path, dpi=110, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("idea.svg"))
