"""Where compiled and tuned things are kept."""

from pathlib import Path

import pytest

from tokenyard import cache_folder


def test_it_is_where_the_environment_says_or_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENYARD_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("TOKENYARD_CACHE", "")
    assert cache_folder() == Path.home() / ".cache" / "tokenyard"
    monkeypatch.delenv("TOKENYARD_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "tokenyard"


def test_without_a_home_nothing_can_be_kept(monkeypatch):
    monkeypatch.setenv("TOKENYARD_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(OSError, match="Not a directory"):
        cache_folder().mkdir(parents=True)
