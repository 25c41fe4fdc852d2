"""The pictures of a run, drawn from the records of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tokenyard_train.records.style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    make_axes,
    make_figure,
    save_figure,
)

_LAST = 20  # steps that a heatmap averages over

Records = Sequence[dict[str, Any]]


def loss_curve(records: Records, path: Path) -> None:
    """Draw the loss in nats per token: training, raw and smoothed; held-out; and, if known, what counting achieves."""
    train, held_out = _of(records, "train"), _of(records, "eval")
    figure = make_figure(7.2, 4.2)
    axes = make_axes(figure, figure.add_gridspec(1, 1)[0], "Loss", "batch", "nats per token")
    batches, losses = [r["batch"] for r in train], np.array([r["loss"] for r in train])
    axes.plot(batches, losses, color=BLUE, alpha=0.25, linewidth=1, label="training")
    axes.plot(
        batches,
        _smoothed(losses),
        color=BLUE,
        linewidth=2,
        label="training, smoothed",
        **_dots(batches),
    )
    if held_out:
        scores = [(r["batch"], r["loss"]) for r in held_out]
        axes.plot(
            *zip(*scores), color=ORANGE, marker="o", markersize=5, linewidth=1.5, label="held-out"
        )
    for name, nats in _baselines(records).items():
        axes.axhline(nats, color=GREY, linestyle=(0, (5, 3)), linewidth=1)
        axes.annotate(
            f"held-out, {name}",
            (1, nats),
            (0, 3),
            axes.get_yaxis_transform(),
            "offset points",
            color=GREY,
            ha="right",
        )
    axes.legend(frameon=False, loc="upper right")
    save_figure(figure, path)


def expert_heatmap(records: Records, path: Path) -> None:
    """Draw the experts' load as multiples of their layer's mean: each over the last steps, the busiest over time."""
    train = [r for r in _of(records, "train") if r["load"]]
    loads = np.array([r["load"] for r in train])  # [steps, layers, experts]
    layers = loads.shape[1] if train else 1
    figure = make_figure(7.2, 4.4 + 0.28 * min(layers, 40))
    grid = figure.add_gridspec(2, 1, height_ratios=[1 + 0.28 * min(layers, 40), 2.2])
    heat = make_axes(
        figure, grid[0], "Load of each expert (1 = its layer's mean)", "expert", "MoE layer"
    )
    course = make_axes(figure, grid[1], "The busiest expert of each layer", "batch", "load")
    if not train:
        for axes in (heat, course):
            axes.text(
                0.5,
                0.5,
                "this model has no experts",
                ha="center",
                va="center",
                transform=axes.transAxes,
            )
    else:
        loads = loads * loads.shape[2]
        draw_heat(figure, heat, loads[-_LAST:].mean(0))
        _draw_course(course, [r["batch"] for r in train], loads.max(2))
    save_figure(figure, path)


def draw_heat(figure: Figure, axes: Axes, load: NDArray[np.float64]) -> None:
    """Draw loads [layers, experts], as multiples of a layer's mean."""
    image = axes.imshow(load, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    axes.grid(False)
    for axis, size, room in ((axes.xaxis, load.shape[1], 20), (axes.yaxis, load.shape[0], 40)):
        axis.set_ticks(range(0, size, math.ceil(size / room)))
    figure.colorbar(image, ax=axes, extend="max", shrink=0.9, pad=0.02).outline.set_visible(False)  # type: ignore[operator]
    if load.shape[1] <= 24 and load.shape[0] <= 16:
        for (layer, expert), value in np.ndenumerate(load):
            ink = "white" if abs(value - 1) > 0.55 else INK
            axes.text(
                expert, layer, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=7
            )


def _draw_course(axes: Axes, batches: list[int], busiest: NDArray[np.float64]) -> None:
    layers = busiest.shape[1]
    colors = colormaps["viridis"](np.linspace(0.1, 0.8, layers))
    for layer in range(layers):
        named = layers <= 4 or layer in (0, layers - 1)
        label = f"layer {layer}" if named else None
        axes.plot(
            batches,
            _smoothed(busiest[:, layer]),
            color=colors[layer],
            label=label,
            **_dots(batches),
        )
    axes.axhline(1, color=GREY, linestyle=(0, (5, 3)), linewidth=1)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.95), high + 0.25 * (high - low))  # room for the legend
    axes.legend(frameon=False, ncols=4, loc="upper right")


def _baselines(records: Records) -> dict[str, float]:
    """Return the baselines in nats per token: bits per byte, scaled as in an evaluation of the same text."""
    held_out = next((r for r in _of(records, "eval") if r.get("bits_per_byte")), None)
    found = _of(records, "baselines")
    if held_out is None or not found:
        return {}
    scale = held_out["loss"] / held_out["bits_per_byte"]
    return {f"{name} model": found[-1][name] * scale for name in ("unigram", "bigram")}


def _of(records: Records, kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a mean over a twentieth of the run, centred, so that it does not lag."""
    reach = len(values) // 40
    sums = np.concatenate(([0.0], np.cumsum(values)))
    places = np.arange(len(values))
    reaches = np.minimum(reach, np.minimum(places, len(values) - 1 - places))
    starts, ends = places - reaches, places + reaches + 1
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def _dots(batches: Sequence[int]) -> dict[str, Any]:
    """A line through one point cannot be seen."""
    return {"marker": "o", "markersize": 4} if len(batches) == 1 else {}
