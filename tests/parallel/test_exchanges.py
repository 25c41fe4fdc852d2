"""Exchanges beyond the kit: ranks that disagree raise, and the host waits once a forward pass."""

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
def test_validate_names_the_rank_that_differs_on_every_rank(name, chunks):
    for fault, message in (
        ("chunks", f"rank 1 of the exchange's group has chunks: {chunks + 1}, and rank 0 {chunks}"),
        ("width", "rank 1 of the exchange's group has tokens of width 6, and rank 0 8"),
        ("slots", "rank 1 of the exchange's group sends 41 slots, but its router kept 40"),
        ("received", "rank 0 of the exchange's group sends"),
    ):
        errors = ranks(2).run(exchange_runs.error_with_fault, name, chunks, fault)
        assert errors[0] == errors[1]
        assert message in errors[0]


@pytest.mark.parametrize(("name", "chunks"), EXCHANGES)
def test_the_host_waits_once_a_forward_pass(name, chunks):
    """Whatever the chunks; never in the backward pass."""
    assert ranks(2).run(exchange_runs.host_syncs, name, chunks) == [(1, 0), (1, 0)]


@pytest.mark.parametrize("name", ["all_to_all", "all_to_all_tokens"])
def test_rows_per_token_is_the_ratio_of_uniform_routing(name):
    for predicted, received in ranks(2).run(exchange_runs.rows_per_token, name):
        assert received == pytest.approx(predicted, rel=0.05)
