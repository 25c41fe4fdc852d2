"""Efficiencies as bars."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tokenyard_train.bench.table import case_key
from tokenyard_train.figures import BLUE, GREY, INK, ORANGE, make_axes, make_figure, save_figure

Record = dict[str, Any]

_PEERS = ("#8a8f98", "#a9adb5", "#c3c6cc", "#d9dbdf")
_OURS = (BLUE, "#6f9bd6", "#a4c1e8", ORANGE)


def efficiency_bars(records: Sequence[Record], title: str, path: Path) -> None:
    """Draw each case's contestants: dense time over layer time, forward and backward; ours coloured, peers grey."""
    timed = [r for r in records if r["note"] is None and r["group"] != "dense"]
    cases = [(key, list(group)) for key, group in groupby(timed, case_key)]
    names = list(dict.fromkeys(r["contestant"] for r in sorted(timed, key=lambda r: r["group"] != "backend")))
    figure = make_figure(2.0 + max(4.5, 1.5 * len(cases)), 4.4)
    axes = make_axes(figure, figure.add_gridspec(1, 1)[0], title, "", "efficiency: dense / layer time")
    ours = [n for n in names if any(r["contestant"] == n and r["group"] == "backend" for r in timed)]
    colours = dict(zip(ours, _OURS * 3)) | dict(zip([n for n in names if n not in ours], _PEERS * 3))
    width = 0.82 / max(1, len(names))
    for i, name in enumerate(names):
        heights = [next((r["efficiency"] for r in group if r["contestant"] == name), 0.0) for _, group in cases]
        _bars(axes, np.arange(len(cases)) + (i - (len(names) - 1) / 2) * width, heights, width, name, colours[name])
    axes.set_xticks(range(len(cases)), [_label(key) for key, _ in cases])
    axes.axhline(1, color=GREY, linewidth=1, linestyle=(0, (5, 3)))
    axes.set_ylim(0, max(1.08, *(r["efficiency"] * 1.12 for r in timed)) if timed else 1.08)
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    save_figure(figure, path)


def _bars(axes: Axes, places: Any, heights: list[float], width: float, name: str, colour: str) -> None:
    drawn = axes.bar(places, heights, width * 0.92, label=name, color=colour)
    labels = [f"{h:.2f}" if h else "" for h in heights]
    axes.bar_label(drawn, labels, fontsize=6.5, color=INK, padding=1)


def _label(key: tuple[str, str, str]) -> str:
    shape, dtype, routing = key
    return f"{shape}\n{dtype}, {routing}"
