"""What exchanges do besides what the kit asks of them: they notice that ranks disagree, and wait for the host once."""

import pytest
from harness import exchange_runs

from tokenyard.testing import ranks

EXCHANGES = [
    ("all_to_all", 1),
    ("all_to_all", 3),
    ("all_to_all_tokens", 1),
    ("all_to_all_tokens", 3),
]


@pytest.mark.parametrize(("name", "chunks"), EXCHANGES)
def test_ranks_that_disagree_are_named_on_every_rank_before_anything_moves(name, chunks):
    for spoil, sentence in (
        ("chunks", f"rank 1 of the exchange's group has chunks: {chunks + 1}, and rank 0 {chunks}"),
        ("width", "rank 1 of the exchange's group has tokens of width 6, and rank 0 8"),
        ("slots", "rank 1 of the exchange's group sends 41 slots, but its router kept 40"),
        ("told", "rank 0 of the exchange's group sends"),
    ):
        said = ranks(2).run(exchange_runs.spoilt, name, chunks, spoil)
        assert said[0] == said[1], said
        assert sentence in said[0]


@pytest.mark.parametrize(("name", "chunks"), EXCHANGES)
def test_the_host_is_told_once_a_forward_pass(name, chunks):
    """Whatever the chunks; not at all in the backward pass."""
    assert ranks(2).run(exchange_runs.copies_to_host, name, chunks) == [(1, 0), (1, 0)]


@pytest.mark.parametrize("name", ["all_to_all", "all_to_all_tokens"])
def test_how_many_rows_come_is_foretold(name):
    """On average, for a router that is fair."""
    for told, came in ranks(2).run(exchange_runs.rows_a_token, name):
        assert came == pytest.approx(told, rel=0.05)
