"""``hatch run docs:plots``: draw every picture of docs/benchmarks anew, from the JSON that lies beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tokenyard_bench.plot import efficiency_bars
from tokenyard_cli.figures import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    make_axes,
    make_figure,
    save_figure,
)

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
_COLOURS = {
    "torch": GREY,
    "triton": ORANGE,
    "cuda": BLUE,
    "gluon": BLUE,
    "gluon, save: fp8": "#8f6bb3",
}
_GOAL = 0.85  # of a copy's bandwidth
_FIRST = 4.0  # nats: what a curve begins with is left out


def main(out: Path = BENCHMARKS) -> None:
    """Draw them all into `out`, by the names that they have in docs/benchmarks."""
    for name, draw in PICTURES.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(json.loads((BENCHMARKS / name).with_suffix(".json").read_text(encoding="utf-8")), path)
        print(f"drew {path}")


def layers(content: dict[str, Any], path: Path) -> None:
    """Draw the efficiency of layers."""
    efficiency_bars(content["records"], content["machine"], path)


def moves(content: dict[str, Any], path: Path) -> None:
    """Draw the bandwidth of moving rows as a share of a copy's: a panel for each shape."""
    found = [r for r in content["records"] if r["note"] is None and "permute" in r["work"]]
    shapes = list(dict.fromkeys(_title(r["shape"]) for r in found))
    figure = make_figure(8.5, 0.9 + 2.2 * len(shapes))
    grid = figure.add_gridspec(len(shapes), 1)
    for place, shape in zip(grid, shapes):
        axes = make_axes(figure, place, shape, "", "a copy's bandwidth")
        _bars(axes, [r for r in found if _title(r["shape"]) == shape])
    figure.suptitle(
        f"Moving rows: {content['machine']['device']}",
        x=0.01,
        ha="left",
        color=INK,
        fontweight="bold",
    )
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    save_figure(figure, path)


def _bars(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    works, backends = (list(dict.fromkeys(r[key] for r in records)) for key in ("work", "backend"))
    for i, backend in enumerate(sorted(backends, key=list(_COLOURS).index)):
        shares = {r["work"]: r["bandwidth"] for r in records if r["backend"] == backend}
        places = np.arange(len(works)) + (i - (len(backends) - 1) / 2) * 0.28
        drawn = axes.bar(
            places, [shares[work] for work in works], 0.26, label=backend, color=_COLOURS[backend]
        )
        axes.bar_label(drawn, fmt="%.2f", fontsize=6.5, padding=1)
    axes.set_xticks(range(len(works)), works)
    axes.grid(visible=False, axis="x")
    axes.axhline(
        _GOAL, color=GREY, linewidth=1, linestyle=(0, (5, 3)), zorder=0.9, label=f"goal, {_GOAL}"
    )
    axes.set_ylim(0, 1.12)


def _title(shape: dict[str, Any]) -> str:
    return f"T {shape['tokens']}, D {shape['dim']}, E {shape['num_experts']}, K {shape['top_k']}"


def training(content: dict[str, Any], path: Path) -> None:
    """Draw the loss of runs by experts and seed, and how far each is from torch's of the same seed."""
    figure = make_figure(10, 3.8)
    grid = figure.add_gridspec(1, 2)
    curves = make_axes(figure, grid[0], "Training loss", "step", "nats a byte")
    apart = make_axes(
        figure, grid[1], "Difference from torch's of the same seed", "step", "nats a byte"
    )
    for experts, seeds in content["runs"].items():
        for i, (seed, run) in enumerate(seeds.items()):
            look = {"color": _COLOURS[experts], "linewidth": 1, "label": None if i else experts}
            curves.plot(run["loss"], **look)
            if experts != "torch":
                apart.plot(np.subtract(run["loss"], content["runs"]["torch"][seed]["loss"]), **look)
    curves.set_ylim(top=_FIRST)
    apart.axhline(0, color=GREY, linewidth=1, zorder=1)
    figure.legend(
        *curves.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    save_figure(figure, path)


PICTURES: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "cpu/layer.png": layers,
    "h100/routing.png": moves,
    "h200/layer-gluon.png": layers,
    "h200/layer-natural.png": layers,
    "h200/layer-zipf.png": layers,
    "h200/train-dbrx.png": training,
}

if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
