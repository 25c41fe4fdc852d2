"""Every picture of the benchmarks is drawn from the JSON beside it, by one command."""

import numpy as np
import plots
import pytest
from matplotlib.image import imread


def test_every_picture_is_one_that_the_command_draws():
    there = {path.relative_to(plots.BENCHMARKS).as_posix() for path in plots.BENCHMARKS.glob("*/*.png")}
    assert there == set(plots.PICTURES)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures")
    plots.main(out)
    return out


@pytest.mark.parametrize("name", plots.PICTURES)
def test_a_picture_drawn_anew_is_the_one_that_is_shown(drawn, name):
    """But for the edges of letters, which another version of matplotlib may draw otherwise."""
    new, shown = imread(drawn / name), imread(plots.BENCHMARKS / name)
    assert new.shape == shown.shape
    assert np.abs(new - shown).mean() < 0.01
