"""The reader of small files: what is no plain, small file of text or JSON is one sentence."""

import os
import time
import tracemalloc

import pytest

from tokenyard import ConfigError, TokenyardError
from tokenyard.bounded import read_json, read_text

STRANGE = {
    "folder": (os.mkdir, "plain file|directory"),
    "pipe": (os.mkfifo, "plain file"),
    "endless device": (lambda path: os.symlink("/dev/zero", path), "plain file"),
    "link to nowhere": (lambda path: os.symlink("nowhere", path), "does not exist"),
    "link to itself": (lambda path: os.symlink("file.json", path), "cannot be read"),
    "latin-1": (lambda path: path.write_bytes(b'{"a": "\xe9"}'), "is not UTF-8 text"),
    "large": (lambda path: path.write_text(" " * 1001), "more than 1,000 bytes"),
}

NO_OBJECT = {
    "cut": ('{"a": ', "is not JSON"),
    "empty": ("", "is not JSON"),
    "list": ("[]", "is not a JSON object but list"),
    "deep in C": ("[" * 200_000, "nested deeper than 40 levels"),
    "deep": ('{"a":' * 41 + "{}" + "}" * 41, "nested deeper than 40 levels"),
    "nan": ('{"a": NaN}', "NaN is not a number of JSON"),
    "key twice": ('{"a": {"b": 1, "b": 2}}', "the key 'b' twice, with different values"),
    "long number": ('{"a": ' + "9" * 5000 + "}", "an integer of more than 64 bits"),
    "long negative": ('{"a": -' + "9" * 20 + "}", "an integer of more than 64 bits"),
    "infinite": ('{"a": 1e999}', "a number beyond those of 64 bits"),
}


@pytest.mark.parametrize("read", [read_text, read_json])
@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_small_text_is_refused_at_once(read, kind, tmp_path):
    make, sentence = STRANGE[kind]
    make(tmp_path / "file.json")
    start = time.monotonic()
    with pytest.raises(TokenyardError, match=rf"file\.json .*({sentence})") as error:
        read(tmp_path / "file.json", 1000, TokenyardError)
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("path", ["a" * 400, "a\0b", "missing"])
def test_paths_without_a_file_are_refused(path):
    with pytest.raises(ConfigError, match=r"cannot be read|is not a path|does not exist"):
        read_text(path)


@pytest.mark.parametrize("kind", NO_OBJECT)
def test_json_that_is_no_small_object_is_refused(kind, tmp_path):
    text, sentence = NO_OBJECT[kind]
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"file\.json .*{sentence}"):
        read_json(path)


def test_an_object_is_read(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{"a": [{"b": 1.5}]}')
    assert read_json(path) == {"a": [{"b": 1.5}]}


def test_a_key_that_stands_twice_with_one_value_is_read(tmp_path):
    (tmp_path / "file.json").write_text('{"a": [1], "b": 2, "a": [1]}')
    assert read_json(tmp_path / "file.json") == {"a": [1], "b": 2}


def test_memory_follows_the_file(tmp_path):
    (tmp_path / "file.json").write_text("{}")
    tracemalloc.start()
    try:
        read_json(tmp_path / "file.json")
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()
