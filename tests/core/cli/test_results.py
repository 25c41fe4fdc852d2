"""Benchmark files."""

import json

import pytest

from tokenyard import ConfigError
from tokenyard_cli.results import read_results, write_results


def test_results_are_read_back(tmp_path):
    path = write_results(tmp_path / "new", "layer", {"kind": "layer", "records": []})
    assert read_results(path) == {"format": 1, "kind": "layer", "records": []}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "is not JSON"),
        (json.dumps([]), "is not a benchmark file of format 1"),
        (json.dumps({"format": 2, "records": []}), "is not a benchmark file of format 1"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, content, said):
    path = tmp_path / "layer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_results(path)
