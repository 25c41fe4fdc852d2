"""One writer per folder, with real processes: the second is refused, a dead one is no obstacle."""

import errno
import fcntl
import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import yaml

from tokenyard import ConfigError
from tokenyard_train import folder_lock
from tokenyard_train.folder_lock import LOCK, lock_folder, lock_new_folder

LOCKS = pytest.mark.parametrize("lock", [lock_folder, lock_new_folder])


@contextmanager
def another_writer(lock, folder):
    """Hold a lock in another process, which is killed at the end. Yields its process id."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with lock(folder):
                os.write(done, b"1")
                time.sleep(60)
        finally:
            os._exit(1)
    try:
        os.close(done)
        assert os.read(ready, 1) == b"1"
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
    monkeypatch.setattr(folder_lock, "PATIENCE", 0.0)


@LOCKS
def test_a_writer_that_is_about_to_end_is_waited_for(lock, tmp_path, monkeypatch):
    """A killed process holds its lock until the kernel has taken it down."""
    monkeypatch.setattr(folder_lock, "PATIENCE", 60.0)
    with another_writer(lock, tmp_path / "run") as pid:
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        with lock(tmp_path / "run"):
            pass


@LOCKS
def test_the_second_writer_is_refused_until_the_first_is_dead(lock, tmp_path):
    folder = tmp_path / "new" / "folder"
    with another_writer(lock, folder) as pid, pytest.raises(ConfigError) as refused:
        lock(folder).__enter__()
    assert f"'{folder}' is being written by process {pid};" in str(refused.value)
    with lock(folder):
        pass
    left = [path.name for path in folder.parent.rglob("*") if path.is_file()]
    assert left == []


@LOCKS
def test_two_spellings_of_a_folder_are_one(lock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with lock(tmp_path / "run"), pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        lock(type(tmp_path)("run")).__enter__()


def test_the_lock_ends_with_the_block_also_by_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), lock_folder(tmp_path):
            raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("text", path)])
def test_a_lock_that_is_no_plain_file_is_refused(make, tmp_path):
    (tmp_path / "text").write_text("keep me")
    make(tmp_path / LOCK)
    with pytest.raises(ConfigError, match=r"plain file; delete it|cannot be written"):
        lock_folder(tmp_path).__enter__()
    assert (tmp_path / "text").read_text() == "keep me"


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_folder(tmp_path):
        assert "cannot be locked (No locks available)" in caplog.text


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run' cannot be written: Not a directory"):
        lock_folder(tmp_path / "file" / "run").__enter__()


COMMANDS = {
    "train": (lock_folder, ("train", "{config}", "save_folder={out}", "autoresume=true")),
    "overwrite": (lock_folder, ("train", "{config}", "save_folder={out}", "save_overwrite=true")),
    "pack": (lock_folder, ("data", "pack", "{out}", "{text}", "--workers", "1")),
    "repack": (lock_folder, ("data", "pack", "{out}", "{text}", "--overwrite")),
    "convert": (lock_new_folder, ("convert", "{run}", "{out}")),
    "convert to a run": (lock_new_folder, ("convert", "{run}", "{out}", "--to", "tokenyard")),
    "upcycle": (
        lock_new_folder,
        ("upcycle", "{text}", "{out}", "--num-experts", "4", "--top-k", "2"),
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_writes_a_folder_refuses_a_second_writer(
    command, tokenyard, settings, text, tmp_path
):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    lock, arguments = COMMANDS[command]
    names = {"config": path, "out": tmp_path / "out", "text": text, "run": tmp_path / "run"}
    with another_writer(lock, names["out"]) as pid:
        before = sorted(tmp_path.rglob("*"))
        code, _, error = tokenyard(*(word.format(**names) for word in arguments))
        assert sorted(tmp_path.rglob("*")) == before
    assert code == 2
    assert f"is being written by process {pid}; wait until it ends" in error


def test_a_run_and_a_packing_go_on_after_a_killed_writer(tokenyard, settings, text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings | {"max_duration": "1ba"}))
    for arguments in (
        ("train", str(path)),
        ("data", "pack", str(tmp_path / "run"), str(text), "--workers", "1"),
    ):
        with another_writer(lock_folder, tmp_path / "run"):
            pass
        assert (tmp_path / "run" / LOCK).exists()
        code, _, error = tokenyard(*arguments)
        assert (code, error) == (0, "")
        assert not (tmp_path / "run" / LOCK).exists()
