"""Checkpoints written in the background: of the right moment, one at a time, errors raised."""

import errno
import threading

import pytest
import torch

from tokenyard_train import Callback, train
from tokenyard_train.checkpoint import CheckpointError, background, read_tensors
from tokenyard_train.checkpoint.background import BackgroundWriter

from ..engine.test_loop import records, tensors


@pytest.fixture
def gate(monkeypatch):
    """Block writing until the gate is set."""
    opened = threading.Event()
    write = background.write_checkpoint

    def wait_and_write(*args):
        assert opened.wait(60)
        return write(*args)

    monkeypatch.setattr(background, "write_checkpoint", wait_and_write)
    yield opened
    opened.set()


class Saves(Callback):
    """Records saved checkpoints as (name, step), and calls `call` after step `at`."""

    def __init__(self, at=None, call=None):
        self.names = []
        self.at = at
        self.call = call

    def batch_end(self, run, record):
        if run.batch == self.at:
            self.call()

    def saved(self, run, checkpoint):
        self.names.append((checkpoint.name, run.batch))


def test_the_checkpoint_holds_the_weights_at_the_call_of_save(tmp_path, gate):
    writer = BackgroundWriter(tmp_path, -1, True, torch.device("cpu"))
    weights = {"a": torch.randn(5, 3)}
    for name in ("ba1", "ba2"):  # the second save copies the same memory
        before = weights["a"].clone()
        writer.save(name, weights, {})
        weights["a"].zero_()
        gate.set()
        loaded = {"a": torch.full((5, 3), torch.nan)}
        read_tensors(writer.finish(), loaded)
        assert torch.equal(loaded["a"], before)
        weights["a"].normal_()
        gate.clear()


def test_training_continues_while_a_checkpoint_is_written(config, console, gate):
    """Two steps run before the first byte is written. The next save waits for the current one."""
    saves = Saves(at=4, call=gate.set)
    train(config(save_async=True, save_interval="2ba"), console, [saves])
    assert saves.names == [("ba2", 4), ("ba4", 6), ("ba6", 6)]


def test_saving_in_the_background_leaves_the_same_files(config, console, tmp_path):
    foreground, in_background = (
        train(
            config(save_async=flag, save_interval="2ba", save_folder=str(tmp_path / str(flag))),
            console,
        ).folder
        for flag in (False, True)
    )
    assert records(in_background) == records(foreground)
    for name in ("ba2", "ba4", "ba6"):
        assert tensors(in_background / name) == tensors(foreground / name)
    assert {path.name for path in in_background.iterdir()} == {
        path.name for path in foreground.iterdir()
    }


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(
    config, console, monkeypatch, tmp_path
):
    from tokenyard_train.checkpoint import dcp

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def spoil():
        monkeypatch.setattr(dcp, "save", lambda *args, **kwargs: full())

    sentence = r"ba4 could not be saved \(.*No space left.*\); the last good checkpoint is .*ba2"
    with pytest.raises(CheckpointError, match=sentence):
        train(
            config(save_async=True, save_interval="2ba", max_duration="60ba"),
            console,
            [Saves(at=4, call=spoil)],
        )
    assert records(tmp_path / "run")[-1]["batch"] < 60


def test_any_error_of_the_thread_ends_the_run(config, console, monkeypatch):
    """Also if the thread ends without a result or an error."""

    def lost(*args):
        raise ValueError("Expected a torch.device with a specified index")

    monkeypatch.setattr(background, "write_checkpoint", lost)
    with pytest.raises(ValueError, match="with a specified index"):
        train(config(save_async=True), console)
    monkeypatch.setattr(background._WriteThread, "run", lambda self: None)
    with pytest.raises(RuntimeError, match="without a checkpoint and without an error"):
        train(config(save_async=True, save_overwrite=True), console)


def test_a_device_that_cannot_be_set_in_the_thread_is_raised(tmp_path, monkeypatch):
    def refuse(device):
        raise ValueError("Expected a torch.device with a specified index")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    writer = BackgroundWriter(tmp_path, -1, True, torch.device("cuda"))
    writer.save("ba1", {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="with a specified index"):
        writer.finish()
