"""The common style of all figures: size, axes and palette.

Core does not depend on matplotlib; a distribution that draws does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#20242c"
BLUE = "#3b6fb6"
ORANGE = "#d9762b"
GREY = "#8a8f98"
LINE = "#e6e8ec"


def make_figure(width: float, height: float) -> Figure:
    """Return an empty figure, its size in inches. It needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def make_axes(figure: Figure, cell: Any, title: str, x: str, y: str) -> Axes:
    """Add axes with a title and labels in a cell of a grid."""
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot(cell)
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
    """Write the figure as an image file."""
    figure.savefig(path, dpi=150)
