"""Every picture of the benchmarks is drawn from the JSON beside it, by one command."""

import numpy as np
import plots
import pytest
from matplotlib.image import imread
from PIL import Image

ROUNDING, LETTERS = (
    1e-5,
    1e-2,
)  # mean difference of a pixel, where a bar that grows by a seventh makes 1e-4


def test_every_picture_is_one_that_the_command_draws():
    there = {
        path.relative_to(plots.BENCHMARKS).as_posix() for path in plots.BENCHMARKS.rglob("*.png")
    }
    assert there == set(plots.PICTURES)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures")
    plots.main(out)
    return out


@pytest.mark.parametrize("name", plots.PICTURES)
def test_a_picture_drawn_anew_is_the_one_that_is_shown(drawn, name):
    """But for letters and their edges, which another version of matplotlib may draw otherwise."""
    new, shown = imread(drawn / name), imread(plots.BENCHMARKS / name)
    assert new.shape == shown.shape
    same_version = drawn_by(drawn / name) == drawn_by(plots.BENCHMARKS / name)
    assert np.abs(new - shown).mean() < (ROUNDING if same_version else LETTERS)


def drawn_by(path):
    """Return the library and version that a picture says it was drawn by."""
    with Image.open(path) as picture:
        return picture.info["Software"]
