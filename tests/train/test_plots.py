"""The pictures of a run, also of an odd one."""

import pytest
from matplotlib.image import imread

from tokenyard_train.plots import _smoothed, expert_heatmap, loss_curve

TRAIN = [{"kind": "train", "batch": i, "loss": 5 / i, "load": [[0.1, 0.9], [0.5, 0.5]]} for i in range(1, 60)]
EVAL = [{"kind": "eval", "batch": 30, "loss": 1.0}]


@pytest.mark.parametrize("draw", [loss_curve, expert_heatmap])
@pytest.mark.parametrize(
    "records",
    [TRAIN + EVAL, TRAIN[:1], [r | {"load": []} for r in TRAIN], [r | {"load": [[1 / 64] * 64] * 40} for r in TRAIN]],
    ids=["usual", "one step", "dense", "large"],
)
def test_pictures_have_ink(tmp_path, draw, records):
    draw(records, tmp_path / "x.png")
    pixels = imread(tmp_path / "x.png")[..., :3]
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.02


def test_smoothing_keeps_a_straight_line_straight():
    line = [float(i) for i in range(200)]
    import numpy as np

    assert _smoothed(np.array(line)) == pytest.approx(line)
