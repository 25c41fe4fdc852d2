"""The look of every picture: one figure, one kind of axes, one palette."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, BLUE, ORANGE, GREY, LINE = "#20242c", "#3b6fb6", "#d9762b", "#8a8f98", "#e6e8ec"


def make_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches, drawn without a display."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def make_axes(figure: Figure, place: Any, title: str, x: str, y: str) -> Axes:
    """Add axes with a title and labels at a place of a grid."""
    axes = figure.add_subplot(place)
    axes.set_title(title, loc="left", color=INK, fontweight="bold", fontsize=11, pad=10)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0, labelcolor=INK)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return axes


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as a picture."""
    figure.savefig(path, dpi=150)
