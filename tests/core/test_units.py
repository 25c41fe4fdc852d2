"""Numbers for people."""

import pytest

from tokenyard.units import (
    counted,
    describe_bytes,
    describe_count,
    describe_duration,
    describe_flop_rate,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1000, "1000 bytes"),
        (1536, "1.50 KiB"),
        (19767 * 2**20, "19.3 GiB"),
        (2**30 - 1, "1.00 GiB"),
        (1000 * 2**20, "1,000 MiB"),
        (99.96 * 2**30, "100 GiB"),
        (5000 * 2**40, "5,000 TiB"),
    ],
)
def test_bytes(count, text):
    assert describe_bytes(count) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (436439.9e9, "436 TFLOP/s"),
        (0.5e9, "500 MFLOP/s"),
        (999.6e12, "1.00 PFLOP/s"),
        (9.996e12, "10.0 TFLOP/s"),
        (12, "12.0 FLOP/s"),
    ],
)
def test_rates(rate, text):
    assert describe_flop_rate(rate) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1234, "1.23 k"), (30.53e9, "30.5 G")]
)
def test_counts(count, text):
    assert describe_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (90000, "1 d 1:00:00")]
)
def test_durations(seconds, text):
    assert describe_duration(seconds) == text


def test_a_count_has_its_noun():
    texts = [counted(count, "batch", "batches") for count in (0, 1, 2, 1000)]
    assert texts == ["0 batches", "1 batch", "2 batches", "1,000 batches"]
