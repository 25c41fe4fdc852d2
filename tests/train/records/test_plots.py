"""The pictures of a run, also of an odd one."""

import numpy as np
import pytest
from matplotlib.image import imread

from tokenyard_train.records.plots import _baselines, _smoothed, expert_heatmap, loss_curve

TRAIN = [
    {"kind": "train", "batch": i, "loss": 5 / i, "load": [[0.1, 0.9], [0.5, 0.5]]}
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
def test_pictures_have_ink(tmp_path, draw, records):
    draw(records, tmp_path / "x.png")
    pixels = imread(tmp_path / "x.png")[..., :3]
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.02


def test_baselines_stand_at_their_nats_per_token():
    """An evaluation says how many nats per token a bit per byte is."""
    assert _baselines([BASELINES, *TRAIN, SCORED]) == pytest.approx(
        {"unigram model": 3.0, "bigram model": 2.4}
    )
    assert _baselines(TRAIN + EVAL) == {}


def test_smoothing_keeps_a_straight_line_straight():
    line = np.arange(200.0)
    assert _smoothed(line) == pytest.approx(line)
