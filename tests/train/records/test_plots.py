"""Plots of a run, including unusual runs."""

import numpy as np
import pytest
from matplotlib.image import imread

from tokenyard_train.records.plots import baselines_in_nats, expert_heatmap, loss_curve, smooth

TRAIN = [
    {"kind": "train", "batch": i, "loss": 5 / i, "lr": 1e-3 / i, "load": [[0.1, 0.9], [0.5, 0.5]]}
    for i in range(1, 60)
]
BASELINES = {"kind": "baselines", "unigram": 4.5, "bigram": 3.6}
SCORED = {"kind": "eval", "batch": 30, "loss": 1.2, "bits_per_byte": 1.8}
EVAL = [{"kind": "eval", "batch": 30, "loss": 1.0}]


@pytest.mark.parametrize("draw", [loss_curve, expert_heatmap])
@pytest.mark.parametrize(
    "records",
    [
        [BASELINES, *TRAIN, SCORED],
        TRAIN + EVAL,
        TRAIN[:1],
        [r | {"load": []} for r in TRAIN],
        [r | {"load": [[1 / 64] * 64] * 40} for r in TRAIN],
    ],
    ids=["usual", "no baselines", "one step", "dense", "large"],
)
def test_plots_are_not_blank(tmp_path, draw, records):
    draw(records, tmp_path / "x.png")
    pixels = imread(tmp_path / "x.png")[..., :3]
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.02


def test_baselines_are_drawn_at_their_nats_per_token():
    """The evaluation of the same text gives nats per token for a bit per byte."""
    assert baselines_in_nats([BASELINES, *TRAIN, SCORED]) == pytest.approx(
        {"unigram model": 3.0, "bigram model": 2.4}
    )
    assert baselines_in_nats(TRAIN + EVAL) == {}


def test_smoothing_keeps_a_straight_line_straight():
    line = np.arange(200.0)
    assert smooth(line) == pytest.approx(line)
