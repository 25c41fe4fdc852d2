"""Draw efficiencies as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator

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

_WIDTH = 5.5  # inches
_UNIT = "dense time / layer time: higher is better"
_PEERS = ("#8a8f98", "#a9adb5", "#c3c6cc", "#d9dbdf")
_BACKENDS = (BLUE, "#6f9bd6", "#a4c1e8", ORANGE)


def efficiency_bars(records: Sequence[Record], machine: Mapping[str, Any], path: Path) -> None:
    """Draw the ratio of dense time to layer time, forward and backward, and save it.

    One panel for each dtype and routing. Backends have colours, peers are grey. The figure is as
    narrow as a phone.
    """
    timed = [r for r in records if r["note"] is None and r["group"] != "dense"]
    panels = list(dict.fromkeys((r["dtype"], r["routing"]) for r in timed))
    shapes = list(dict.fromkeys(r["shape"]["name"] for r in timed))
    colours = _colours(timed)
    panel_height = 0.9 + len(shapes) * (0.1 + 0.16 * len(colours))
    figure = make_figure(_WIDTH, 1.3 + 0.12 * len(colours) + panel_height * max(1, len(panels)))
    grid = figure.add_gridspec(max(1, len(panels)), 1)
    for i, (dtype, routing) in enumerate(panels):
        axes = make_axes(figure, grid[i], f"{dtype}, {routing} routing", _UNIT, "")
        panel = [r for r in timed if (r["dtype"], r["routing"]) == (dtype, routing)]
        _draw_panel(axes, panel, shapes, colours)
    versions = f"{machine['device']}, torch {machine['versions']['torch']}"
    title = f"One MoE layer, forward and backward\n{versions}"
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontweight="bold", fontsize=11)
    if panels:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9
        )
    save_figure(figure, path)


def _draw_panel(
    axes: Axes, records: Sequence[Record], shapes: Sequence[str], colours: dict[str, str]
) -> None:
    height = 0.84 / len(colours)
    groups = {r["contestant"]: r["group"] for r in records}
    for i, (name, colour) in enumerate(colours.items()):
        widths = {r["shape"]["name"]: r["efficiency"] for r in records if r["contestant"] == name}
        y = np.arange(len(shapes)) + (i - (len(colours) - 1) / 2) * height
        x = [widths.get(shape, 0.0) for shape in shapes]
        label = f"experts: {name}" if groups.get(name) == "backend" else name
        bars = axes.barh(y, x, height * 0.92, label=label, color=colour)
        labels = [f"{widths[shape]:.2f}" if shape in widths else "" for shape in shapes]
        axes.bar_label(bars, labels, fontsize=8, padding=2, color=INK)
    axes.set_yticks(range(len(shapes)), shapes)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.axvline(1, color=GREY, linewidth=1, linestyle=(0, (5, 3)))
    axes.xaxis.set_major_locator(MultipleLocator(0.25))
    axes.set_xlim(0, max(1.08, *(1.12 * r["efficiency"] for r in records)))


def _colours(records: Sequence[Record]) -> dict[str, str]:
    """Return a colour for each entrant, backends first."""
    backends = dict.fromkeys(r["contestant"] for r in records if r["group"] == "backend")
    peers = dict.fromkeys(r["contestant"] for r in records if r["group"] == "peer")
    return dict(zip(backends, cycle(_BACKENDS))) | dict(zip(peers, cycle(_PEERS)))
