"""``hatch run docs:plots``: redraw every picture of docs/benchmarks from the JSON beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator
from speedups import speedups

from tokenyard_bench.plot import efficiency_bars
from tokenyard_cli.figures import (
    BLUE,
    GREY,
    INK,
    LINE,
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
    "bf16": GREY,
    "fp8": ORANGE,
    "fp8, weight_gradients: fp8": BLUE,
    "fp32": GREY,
    "amp_bf16": INK,
    "bf16_master": BLUE,
    "bf16_master, moments: bf16": ORANGE,
    "bf16_master, moments: 8bit": "#8f6bb3",
}
_WIDTH = 5.5  # inches: text of 9 points is readable on a phone
_LARGEST_LOSS = 4.0  # nats per byte; the first steps are above it and are cut off


def main(out: Path = BENCHMARKS) -> None:
    """Draw all pictures into `out`, under their names in docs/benchmarks."""
    for name, draw in PICTURES.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(json.loads((BENCHMARKS / name).with_suffix(".json").read_text(encoding="utf-8")), path)
        print(f"drew {path}")


def layers(content: dict[str, Any], path: Path) -> None:
    """Draw the efficiency of MoE layers."""
    efficiency_bars(content["records"], content["machine"], path)


def moves(content: dict[str, Any], path: Path) -> None:
    """Draw the bandwidth of the permutation as a share of a copy's bandwidth, per shape."""
    records = [r for r in content["records"] if r["note"] is None and "permute" in r["work"]]
    shapes = list(dict.fromkeys(_title(r["shape"]) for r in records))
    figure = make_figure(_WIDTH, 0.9 + 2.7 * len(shapes))
    grid = figure.add_gridspec(len(shapes), 1)
    for cell, shape in zip(grid, shapes):
        axes = make_axes(figure, cell, shape, "share of a copy's bandwidth: higher is better", "")
        _bars(axes, [r for r in records if _title(r["shape"]) == shape])
    figure.suptitle(
        f"Moving rows: {content['machine']['device']}",
        x=0.01,
        ha="left",
        color=INK,
        fontweight="bold",
    )
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    save_figure(figure, path)


def _bars(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    works = list(dict.fromkeys(r["work"] for r in records))
    backends = list(dict.fromkeys(r["backend"] for r in records))
    for i, backend in enumerate(sorted(backends, key=list(_COLOURS).index)):
        shares = {r["work"]: r["bandwidth"] for r in records if r["backend"] == backend}
        y = np.arange(len(works)) + (i - (len(backends) - 1) / 2) * 0.28
        widths = [shares[work] for work in works]
        bars = axes.barh(y, widths, 0.26, label=backend, color=_COLOURS[backend])
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2, color=INK)
    axes.set_yticks(range(len(works)), [work.replace(" ", "\n") for work in works])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MultipleLocator(0.25))
    axes.set_xlim(0, 1.12)


def _title(shape: dict[str, Any]) -> str:
    return f"T {shape['tokens']}, D {shape['dim']}, E {shape['num_experts']}, K {shape['top_k']}"


def training(content: dict[str, Any], path: Path) -> None:
    """Draw the loss per kind of experts and seed, and its difference from the first kind's."""
    first, *_ = content["runs"]
    figure = make_figure(_WIDTH, 6.4)
    grid = figure.add_gridspec(2, 1)
    curves = make_axes(figure, grid[0], "Training loss", "step", "nats per byte")
    title = f"Difference from {first}, same seed"
    differences = make_axes(figure, grid[1], title, "step", "nats per byte")
    for experts, seeds in content["runs"].items():
        for i, (seed, run) in enumerate(seeds.items()):
            style = {"color": _COLOURS[experts], "linewidth": 1, "label": None if i else experts}
            curves.plot(run["loss"], **style)
            if experts != first:
                reference = content["runs"][first][seed]["loss"]
                differences.plot(np.subtract(run["loss"], reference), **style)
    curves.set_ylim(top=_LARGEST_LOSS)
    differences.axhline(0, color=GREY, linewidth=1, zorder=1)
    figure.legend(
        *curves.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    save_figure(figure, path)


def spread(content: dict[str, Any], path: Path) -> None:
    """Draw each setting's held-out loss, the mean of its seeds, and its difference from the first.

    An area is the range of the first setting's seeds.
    """
    first, *_ = content["runs"]
    losses = {name: _held_out(seeds) for name, seeds in content["runs"].items()}
    steps, references = losses[first]
    figure = make_figure(_WIDTH, 6.4)
    grid = figure.add_gridspec(2, 1)
    curves = make_axes(figure, grid[0], "Held-out loss", "step", "nats per byte")
    title = f"Difference from {first}"
    differences = make_axes(figure, grid[1], title, "step", "nats per byte")
    for axes, base in ((curves, 0.0), (differences, references.mean(0))):
        if len(references) > 1:
            low, high = references.min(0) - base, references.max(0) - base
            axes.fill_between(steps, low, high, color=LINE, label=f"{first}, all seeds")
        for name, (at, values) in losses.items():
            style = {"color": _COLOURS[name], "linewidth": 1.2, "label": name}
            axes.plot(at, values.mean(0) - base, **style)
    figure.legend(
        *curves.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    save_figure(figure, path)


def _held_out(seeds: dict[str, dict[str, Any]]) -> tuple[list[int], np.ndarray]:
    """Return the steps of the evaluations, and the losses [seeds, evaluations]."""
    runs = [run["held_out"] for run in seeds.values()]
    return [int(step) for step in runs[0]], np.array([list(run.values()) for run in runs])


def rates(content: dict[str, Any], path: Path) -> None:
    """Draw the held-out loss of optimizers: the best rate of each in full, the others dotted."""
    figure = make_figure(_WIDTH, 4.2)
    grid = figure.add_gridspec(1, 1)
    title = "The quickstart by AdamW and Muon"
    axes = make_axes(figure, grid[0], title, "step", "held-out bits per byte: lower is better")
    for optimizer, colour in (("AdamW", GREY), ("Muon", ORANGE)):
        runs = [run for run in content["runs"] if run["optimizer"] == optimizer]
        best = min(runs, key=lambda run: run["bits_per_byte"][-1])
        for run in runs:
            label = f"{optimizer}, lr {run['lr']:g}" if run is best else None
            style = "-" if run is best else ":"
            axes.plot(run["step"], run["bits_per_byte"], "o" + style, color=colour, label=label)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    save_figure(figure, path)


PICTURES: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "cpu/layer.png": layers,
    "cpu/optimizers.png": rates,
    "h100/routing.png": moves,
    "h200/fp8-long.png": spread,
    "h200/fp8-loss.png": spread,
    "h200/layer-gluon.png": layers,
    "h200/layer-natural.png": layers,
    "h200/layer-peers.svg": speedups,
    "h200/states-loss.png": spread,
    "h200/train-dbrx.png": training,
}

if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
