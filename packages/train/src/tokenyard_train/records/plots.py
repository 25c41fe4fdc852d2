"""Plots of a run, drawn from the records of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tokenyard_cli.figures import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    make_axes,
    make_figure,
    save_figure,
)

_HEATMAP_STEPS = 20  # last steps of a run, averaged by the heatmap

Records = Sequence[dict[str, Any]]


def loss_curve(records: Records, path: Path) -> None:
    """Draw the loss in nats per token, and the learning rate below it.

    Curves: training (raw and smoothed), held-out, and the n-gram baselines if they were recorded.
    The title has the name of the run's folder.
    """
    train = _of_kind(records, "train")
    batches = [r["batch"] for r in train]
    losses = np.array([r["loss"] for r in train])
    figure = make_figure(7.2, 5.4)
    grid = figure.add_gridspec(2, 1, height_ratios=[3.4, 1])
    title = f"Loss of {path.resolve().parent.name}"
    axes = make_axes(figure, grid[0], title, "", "nats per token")
    axes.sharex(_draw_rates(make_axes(figure, grid[1], "Learning rate", "batch", ""), train))
    axes.plot(batches, losses, color=BLUE, alpha=0.25, linewidth=1, label="training")
    axes.plot(
        batches,
        smooth(losses),
        color=BLUE,
        linewidth=2,
        label="training, smoothed",
        **_single_point(batches),
    )
    if held_out := [(r["batch"], r["loss"]) for r in _of_kind(records, "eval")]:
        axes.plot(
            *zip(*held_out), color=ORANGE, marker="o", markersize=5, linewidth=1.5, label="held-out"
        )
    for name, nats in baselines_in_nats(records).items():
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


def _draw_rates(axes: Axes, train: Records) -> Axes:
    batches = [r["batch"] for r in train]
    axes.plot(batches, [r["lr"] for r in train], color=GREY, **_single_point(batches))
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    return axes


def expert_heatmap(records: Records, path: Path) -> None:
    """Draw the experts' load as multiples of their layer's mean.

    The heatmap shows every expert, averaged over the last steps. The curves show the busiest expert
    of each layer over time.
    """
    train = [r for r in _of_kind(records, "train") if r["load"]]
    loads = np.array([r["load"] for r in train])  # [steps, layers, experts]
    layers = loads.shape[1] if train else 1
    figure = make_figure(7.2, 4.4 + 0.28 * min(layers, 40))
    grid = figure.add_gridspec(2, 1, height_ratios=[1 + 0.28 * min(layers, 40), 2.2])
    heat = make_axes(
        figure, grid[0], "Load of each expert (1 = its layer's mean)", "expert", "MoE layer"
    )
    curves = make_axes(figure, grid[1], "The busiest expert of each layer", "batch", "load")
    if not train:
        for axes in (heat, curves):
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
        draw_heat(figure, heat, loads[-_HEATMAP_STEPS:].mean(0))
        _draw_busiest(curves, [r["batch"] for r in train], loads.max(2))
    save_figure(figure, path)


def draw_heat(figure: Figure, axes: Axes, load: NDArray[np.float64]) -> None:
    """Draw loads [layers, experts], given as multiples of a layer's mean."""
    image = axes.imshow(load, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    axes.grid(False)
    for axis, size, ticks in ((axes.xaxis, load.shape[1], 20), (axes.yaxis, load.shape[0], 40)):
        axis.set_ticks(range(0, size, math.ceil(size / ticks)))
    bar = figure.colorbar(image, ax=axes, extend="max", shrink=0.9, pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]
    if load.shape[1] <= 24 and load.shape[0] <= 16:
        for (layer, expert), value in np.ndenumerate(load):
            ink = "white" if abs(value - 1) > 0.55 else INK
            axes.text(
                expert, layer, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=7
            )


def _draw_busiest(axes: Axes, batches: list[int], busiest: NDArray[np.float64]) -> None:
    """Draw a curve for each layer; `busiest` is [steps, layers]."""
    layers = busiest.shape[1]
    colors = colormaps["viridis"](np.linspace(0.1, 0.8, layers))
    for layer in range(layers):
        named = layers <= 4 or layer in (0, layers - 1)
        label = f"layer {layer}" if named else None
        axes.plot(
            batches,
            smooth(busiest[:, layer]),
            color=colors[layer],
            label=label,
            **_single_point(batches),
        )
    axes.axhline(1, color=GREY, linestyle=(0, (5, 3)), linewidth=1)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.95), high + 0.25 * (high - low))  # leaves space for the legend
    axes.legend(frameon=False, ncols=4, loc="upper right")


def baselines_in_nats(records: Records) -> dict[str, float]:
    """Return the n-gram baselines in nats per token, by label; empty if they were not recorded.

    Baselines are recorded in bits per byte. An evaluation of the same text gives the scale.
    """
    evaluation = next((r for r in _of_kind(records, "eval") if r.get("bits_per_byte")), None)
    baselines = _of_kind(records, "baselines")
    if evaluation is None or not baselines:
        return {}
    scale = evaluation["loss"] / evaluation["bits_per_byte"]
    return {f"{name} model": baselines[-1][name] * scale for name in ("unigram", "bigram")}


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a moving average over a twentieth of the run, centred so that it does not lag."""
    radius = len(values) // 40
    sums = np.concatenate(([0.0], np.cumsum(values)))
    steps = np.arange(len(values))
    radii = np.minimum(radius, np.minimum(steps, len(values) - 1 - steps))
    starts = steps - radii
    ends = steps + radii + 1
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def _of_kind(records: Records, kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def _single_point(batches: Sequence[int]) -> dict[str, Any]:
    """Return marker options for one batch, since a line through one point is invisible."""
    return {"marker": "o", "markersize": 4} if len(batches) == 1 else {}
