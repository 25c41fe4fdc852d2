"""Exchanges beyond the kit: ranks that disagree, host syncs, and tokens in FP8."""

import math

import pytest
import torch
from harness import exchange_runs

from tokenyard import ConfigError, Workload
from tokenyard.permutations import TorchPermutation
from tokenyard.testing import ranks
from tokenyard_parallel.exchanges import SlotExchange, TokenExchange

NAMES = ["all_to_all", "all_to_all_tokens"]
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


@pytest.mark.parametrize("name", NAMES)
def test_rows_per_token_is_the_ratio_of_uniform_routing(name):
    for predicted, received in ranks(2).run(exchange_runs.rows_per_token, name):
        assert received == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize(("name", "chunks"), EXCHANGES)
def test_tokens_and_the_gradient_of_the_output_travel_in_8_bits(name, chunks):
    """Results and the gradient of tokens travel in 16.

    What a rank sends is what the exchange predicts, and equal runs give equal results.
    """
    group = ranks(2)
    run = (exchange_runs.traffic, name, chunks, torch.bfloat16)
    traffic = group.run(*run)
    assert traffic == group.run(*run)
    sent = [rank.sent for rank in traffic]
    forward, backward = map(sum, zip(*sent))
    metadata = 8 * (1 if name == "all_to_all" else exchange_runs.TOP_K)
    row = 256 + 2 * 4 + metadata + 2 * 256  # numbers, scales, weights and ids; and the result
    assert backward % row == 0
    assert forward == backward + 2 * 2 * 4 * chunks  # counts
    for predicted, both in zip((rank.predicted for rank in traffic), sent):
        assert both == pytest.approx((predicted, predicted), rel=0.05)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_no_rounding_hides_nan_or_infinity(name, number):
    """NaN stays where it is. Infinity makes NaN of its block: no number hides it."""
    columns = [5] if math.isnan(number) else range(128)
    places = [[3, column] for column in columns]
    clean, hit = ranks(2).run(exchange_runs.numbers_that_are_not_finite, name, number)
    assert clean == [[], []]
    assert hit == [places, places]


@pytest.mark.parametrize("name", NAMES)
def test_validate_names_the_rank_that_sends_another_precision(name):
    errors = ranks(2).run(exchange_runs.differs_in_precision, name)
    message = "rank 1 of the exchange's group has bytes a sent token: 264, and rank 0 1024"
    assert errors == [message, message]


@pytest.mark.parametrize("exchange", [SlotExchange, TokenExchange])
@pytest.mark.parametrize(
    ("dim", "precision", "message"),
    [
        (
            96,
            "fp8",
            "the exchange cannot send tokens in FP8: .* and dim is 96, not a mu",
        ),
        (128, "int8", "backends.exchange.precision is 'int8'; known is: fp8, and without it"),
    ],
)
def test_what_cannot_be_sent_in_fp8_is_one_sentence(exchange, dim, precision, message):
    workload = Workload(dim, 12, 4, 2, expert_parallel=2)
    with pytest.raises(ConfigError, match=message):
        exchange(workload, TorchPermutation(workload), precision=precision)
