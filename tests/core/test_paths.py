"""The cache folder, and paths without links."""

from pathlib import Path

import pytest

from tokenyard import cache_folder
from tokenyard.paths import real_path


def test_the_environment_overrides_the_folder_in_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENYARD_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("TOKENYARD_CACHE", "")
    assert cache_folder() == Path.home() / ".cache" / "tokenyard"
    monkeypatch.delenv("TOKENYARD_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "tokenyard"


def test_without_a_home_directory_the_folder_cannot_be_created(monkeypatch):
    monkeypatch.setenv("TOKENYARD_CACHE", "~no-such-user/cache")
    with pytest.raises(OSError, match="Not a directory"):
        cache_folder().mkdir(parents=True)


def test_a_loop_of_links_has_a_real_path(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert real_path(tmp_path / "a") in (tmp_path / "a", tmp_path / "b")
