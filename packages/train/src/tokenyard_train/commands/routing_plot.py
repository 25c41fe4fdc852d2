"""Plot how a model routes a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokenyard_cli.figures import make_axes, make_figure, save_figure
from tokenyard_train.commands.routing_counts import LayerReport
from tokenyard_train.records.plots import draw_heat

_MATRICES = 3  # layers with a plot of pairs: the first, one in the middle, the last


def routing_plot(layers: Sequence[LayerReport], path: Path) -> None:
    """Draw the load of every expert, and for some layers the pairs of experts that share tokens."""
    rows = 1 + 0.28 * min(len(layers), 40)
    shown = sorted({round(i * (len(layers) - 1) / (_MATRICES - 1)) for i in range(_MATRICES)})
    figure = make_figure(8.4, 3.6 + rows)
    grid = figure.add_gridspec(2, len(shown), height_ratios=[rows, 2.6])
    heat = make_axes(
        figure, grid[0, :], "Load of each expert (1 = its layer's mean)", "expert", "MoE layer"
    )
    draw_heat(figure, heat, np.array([layer.load for layer in layers]) * len(layers[0].load))
    largest = max(max(map(max, layers[i].together)) for i in shown) or 1.0
    for column, number in enumerate(shown):
        y = "expert i" if not column else ""
        axes = make_axes(figure, grid[1, column], f"Layer {number}", "expert j", y)
        image = axes.imshow(np.array(layers[number].together), cmap="viridis", vmin=0, vmax=largest)
        axes.grid(False)
    bar = figure.colorbar(image, ax=figure.axes[2:], shrink=0.8, pad=0.02)
    bar.set_label("share of i's tokens that j has too")
    bar.outline.set_visible(False)  # type: ignore[operator]
    save_figure(figure, path)
