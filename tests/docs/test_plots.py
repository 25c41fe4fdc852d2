"""One command draws every picture of the benchmarks from the JSON beside it."""

import numpy as np
import plots
import pytest
from matplotlib.image import imread
from PIL import Image

# Limits of the mean difference of a pixel. A bar that grows by a seventh changes it by 1e-4.
SAME_VERSION = 1e-5
OTHER_VERSION = 1e-2  # another version of matplotlib may draw letters and edges otherwise


def test_the_command_draws_every_picture():
    paths = (*plots.BENCHMARKS.rglob("*.png"), *plots.BENCHMARKS.rglob("*.svg"))
    names = {path.relative_to(plots.BENCHMARKS).as_posix() for path in paths}
    assert names == set(plots.PICTURES)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures")
    plots.main(out)
    return out


@pytest.mark.parametrize("name", [name for name in plots.PICTURES if name.endswith(".svg")])
def test_a_redrawn_drawing_equals_the_published_one(drawn, name):
    assert (drawn / name).read_text() == (plots.BENCHMARKS / name).read_text()


@pytest.mark.parametrize("name", [name for name in plots.PICTURES if name.endswith(".png")])
def test_a_redrawn_plot_equals_the_published_one(drawn, name):
    new = imread(drawn / name)
    published = imread(plots.BENCHMARKS / name)
    assert new.shape == published.shape
    same_version = drawn_by(drawn / name) == drawn_by(plots.BENCHMARKS / name)
    assert np.abs(new - published).mean() < (SAME_VERSION if same_version else OTHER_VERSION)


def drawn_by(path):
    """Return the library and version in a picture's metadata."""
    with Image.open(path) as picture:
        return picture.info["Software"]
