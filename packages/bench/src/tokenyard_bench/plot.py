"""Draw efficiencies as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tokenyard_cli.figures import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    make_axes,
    make_figure,
    save_figure,
)
from tokenyard_cli.results import Record

_PEERS = ("#8a8f98", "#a9adb5", "#c3c6cc", "#d9dbdf")
_BACKENDS = (BLUE, "#6f9bd6", "#a4c1e8", ORANGE)


def efficiency_bars(records: Sequence[Record], machine: Mapping[str, Any], path: Path) -> None:
    """Draw the ratio of dense time to layer time, forward and backward, and save it.

    One panel for each dtype and routing. Peers are grey.
    """
    timed = [r for r in records if r["note"] is None and r["group"] != "dense"]
    panels = list(dict.fromkeys((r["dtype"], r["routing"]) for r in timed))
    shapes = list(dict.fromkeys(r["shape"]["name"] for r in timed))
    colours = _colours(timed)
    width = 1.6 + max(4.5, 0.32 * len(shapes) * len(colours))
    figure = make_figure(width, 1.2 + 2.6 * max(1, len(panels)))
    grid = figure.add_gridspec(max(1, len(panels)), 1)
    for i, (dtype, routing) in enumerate(panels):
        axes = make_axes(figure, grid[i], f"{dtype}, {routing} routing", "", "dense / layer time")
        panel = [r for r in timed if (r["dtype"], r["routing"]) == (dtype, routing)]
        _draw_panel(axes, panel, shapes, colours)
    versions = f"{machine['device']}, torch {machine['versions']['torch']}"
    key = "colour: tokenyard, grey: others; higher is better"
    title = f"One MoE layer, forward and backward\n{versions}\n{key}"
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontweight="bold")
    if panels:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)


def _draw_panel(
    axes: Axes, records: Sequence[Record], shapes: Sequence[str], colours: dict[str, str]
) -> None:
    width = 0.84 / len(colours)
    for i, (name, colour) in enumerate(colours.items()):
        heights = {r["shape"]["name"]: r["efficiency"] for r in records if r["contestant"] == name}
        x = np.arange(len(shapes)) + (i - (len(colours) - 1) / 2) * width
        y = [heights.get(shape, 0.0) for shape in shapes]
        bars = axes.bar(x, y, width * 0.92, label=name, color=colour)
        labels = [f"{heights[shape]:.2f}" if shape in heights else "" for shape in shapes]
        axes.bar_label(bars, labels, fontsize=6.5, padding=1)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.grid(visible=False, axis="x")
    axes.axhline(1, color=GREY, linewidth=1, linestyle=(0, (5, 3)))
    axes.set_ylim(0, max(1.08, *(1.12 * r["efficiency"] for r in records)))


def _colours(records: Sequence[Record]) -> dict[str, str]:
    """Return a colour for each entrant, backends first."""
    backends = dict.fromkeys(r["contestant"] for r in records if r["group"] == "backend")
    peers = dict.fromkeys(r["contestant"] for r in records if r["group"] == "peer")
    return dict(zip(backends, cycle(_BACKENDS))) | dict(zip(peers, cycle(_PEERS)))
