"""The pictures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_LAST = 20  # steps that a heatmap averages over
_INK, _BLUE, _ORANGE, _GREY = "#20242c", "#3b6fb6", "#d9762b", "#8a8f98"


def loss_curve(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the training loss, raw and smoothed, and the held-out loss, in nats per token."""
    train, held_out = _of(records, "train"), _of(records, "eval")
    figure, axes = _figure(7.2, 4.2)
    batches, losses = [r["batch"] for r in train], np.array([r["loss"] for r in train])
    axes.plot(batches, losses, color=_BLUE, alpha=0.25, linewidth=1)
    axes.plot(batches, _smoothed(losses), color=_BLUE, linewidth=2, label="training, smoothed")
    if held_out:
        scores = [(r["batch"], r["loss"]) for r in held_out]
        axes.plot(*zip(*scores), color=_ORANGE, marker="o", linewidth=1.5, label="held-out")
    axes.set(xlabel="batch", ylabel="loss (nats per token)", title="Loss")
    axes.legend(frameon=False)
    _save(figure, path)


def expert_heatmap(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the load of every expert in every layer, as a multiple of the mean, over the last steps of the run."""
    loads = [r["load"] for r in _of(records, "train") if r["load"]][-_LAST:]
    figure, axes = _figure(7.2, 2.2 + 0.3 * (len(loads[0]) if loads else 1))
    axes.set(title="Expert load over the last batches (1 = the mean)", xlabel="expert", ylabel="MoE layer")
    if not loads:
        axes.text(0.5, 0.5, "this model has no experts", ha="center", va="center", transform=axes.transAxes)
    else:
        load = np.mean(np.array(loads), axis=0)
        load = load * load.shape[1]  # [layers, experts]
        image = axes.imshow(load, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
        axes.set_yticks(range(load.shape[0]))
        if load.shape[1] <= 32:
            axes.set_xticks(range(load.shape[1]))
        axes.grid(False)
        figure.colorbar(image, ax=axes, extend="max", shrink=0.9)
        if load.size <= 256:
            for (layer, expert), value in np.ndenumerate(load):
                ink = "white" if abs(value - 1) > 0.7 else _INK
                axes.text(expert, layer, f"{value:.1f}", ha="center", va="center", color=ink, fontsize=7)
    _save(figure, path)


def _of(records: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def _smoothed(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a mean over a twentieth of the run, centred, so that it does not lag."""
    reach = len(values) // 40
    sums = np.concatenate(([0.0], np.cumsum(values)))
    places = np.arange(len(values))
    reaches = np.minimum(reach, np.minimum(places, len(values) - 1 - places))
    starts, ends = places - reaches, places + reaches + 1
    return (sums[ends] - sums[starts]) / (ends - starts)  # type: ignore[no-any-return]


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color="#e6e8ec", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY, labelcolor=_INK)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
