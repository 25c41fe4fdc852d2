"""Matrices that are cut over ranks come to one rank each, and their results go back."""

import pytest
from harness import layout_runs

from tokenyard.testing import ranks

SHAPES = [(8, 4), (5, 3), (2, 7), (3, 8, 5), (6, 2, 2), (1, 4)]


@pytest.mark.parametrize("dim", [-2, -1])
def test_parts_of_results_are_those_of_whole_matrices(dim):
    """Also where sizes are not divisible, and where ranks have no rows."""
    for answer in ranks(4).run(layout_runs.whole_matrices, SHAPES, dim):
        assert len(answer) == len(SHAPES)
        assert all(answer.values()), answer
