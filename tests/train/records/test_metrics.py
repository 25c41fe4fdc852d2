"""The metrics file: what is read back of a file that was changed."""

import json

import pytest

from tokenyard_train.records.metrics import Metrics

TRAIN = {"kind": "train", "batch": 1, "loss": 2.5, "seconds": 0.1}
EVAL = {"kind": "eval", "batch": 1, "loss": 2.0, "bits_per_byte": 1.5}


def without(record, key):
    return {name: value for name, value in record.items() if name != key}


def test_a_record_is_read_as_it_was_written(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write(TRAIN)
    metrics.write(EVAL)
    assert metrics.read() == [TRAIN, EVAL]


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_valid_json_and_read_as_a_number(tmp_path, number):
    """In a list, too: an expert's share of no tokens is nan."""
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write(EVAL | {"loss": float(number), "routing": [{"entropy": float(number)}]})
    line = json.loads(metrics.path.read_text(), parse_constant=pytest.fail)
    assert line == EVAL | {"loss": number, "routing": [{"entropy": number}]}
    (record,) = metrics.read()
    for value in (record["loss"], record["routing"][0]["entropy"]):
        assert isinstance(value, float)
        assert str(value) == number


@pytest.mark.parametrize(
    "damaged",
    [
        without(TRAIN, "loss"),
        without(TRAIN, "seconds"),
        without(EVAL, "bits_per_byte"),
        TRAIN | {"loss": "2.5"},
        TRAIN | {"kind": ["train"]},
        [TRAIN],
    ],
    ids=str,
)
def test_a_damaged_record_is_left_out_and_named(tmp_path, caplog, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(TRAIN) + "\n" + json.dumps(damaged) + "\n")
    metrics = Metrics(path)
    assert metrics.read() == [TRAIN]
    metrics.rewind(path.stat().st_size)
    assert "line 2 is damaged" in caplog.text
