"""Checkpoints written while training goes on: of the moment they were asked for, one at a time, never silently lost."""

import errno
import threading

import pytest
import torch

from tokenyard_train import Callback, train
from tokenyard_train.checkpoint import CheckpointError, read_tensors
from tokenyard_train.checkpoint import background as saver
from tokenyard_train.checkpoint.background import Saver

from ..engine.test_loop import records, tensors


@pytest.fixture
def gate(monkeypatch):
    """Let nothing be written until the gate is open."""
    opened, write = threading.Event(), saver.write_checkpoint

    def behind_the_gate(*args):
        assert opened.wait(60)
        return write(*args)

    monkeypatch.setattr(saver, "write_checkpoint", behind_the_gate)
    yield opened
    opened.set()


class Heard(Callback):
    def __init__(self, at=None, call=None):
        self.names, self.at, self.call = [], at, call

    def batch_end(self, run, record):
        if run.batch == self.at:
            self.call()

    def saved(self, run, checkpoint):
        self.names.append((checkpoint.name, run.batch))


def test_what_is_saved_is_what_was_when_it_was_asked_for(tmp_path, gate):
    behind, weights = Saver(tmp_path, -1, True, torch.device("cpu")), {"a": torch.randn(5, 3)}
    for name in ("ba1", "ba2"):  # the second time in the same memory
        before = weights["a"].clone()
        behind.save(name, weights, {})
        weights["a"].zero_()
        gate.set()
        found = {"a": torch.full((5, 3), torch.nan)}
        read_tensors(behind.finish(), found)
        assert torch.equal(found["a"], before)
        weights["a"].normal_()
        gate.clear()


def test_training_goes_on_meanwhile(config, console, gate):
    """Two steps are taken before the first byte is written; the next checkpoint waits for the one before."""
    heard = Heard(at=4, call=gate.set)
    train(config(save_async=True, save_interval="2ba"), console, [heard])
    assert heard.names == [("ba2", 4), ("ba4", 6), ("ba6", 6)]


def test_a_run_leaves_the_same_files_whether_it_waits_or_not(config, console, tmp_path):
    waits, goes_on = (
        train(
            config(save_async=behind, save_interval="2ba", save_folder=str(tmp_path / str(behind))),
            console,
        ).folder
        for behind in (False, True)
    )
    assert records(goes_on) == records(waits)
    for name in ("ba2", "ba4", "ba6"):
        assert tensors(goes_on / name) == tensors(waits / name)
    assert {path.name for path in goes_on.iterdir()} == {path.name for path in waits.iterdir()}


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
            [Heard(at=4, call=spoil)],
        )
    assert records(tmp_path / "run")[-1]["batch"] < 60


def test_whatever_goes_wrong_in_the_thread_ends_the_run(config, console, monkeypatch):
    """Not only what writing may raise: a thread that just ends, too."""

    def lost(*args):
        raise ValueError("Expected a torch.device with a specified index")

    monkeypatch.setattr(saver, "write_checkpoint", lost)
    with pytest.raises(ValueError, match="with a specified index"):
        train(config(save_async=True), console)
    monkeypatch.setattr(saver._Writing, "run", lambda self: None)
    with pytest.raises(RuntimeError, match="without a checkpoint and without an error"):
        train(config(save_async=True, save_overwrite=True), console)


def test_a_device_that_cannot_be_set_in_the_thread_is_raised(tmp_path, monkeypatch):
    def refuse(device):
        raise ValueError("Expected a torch.device with a specified index")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    behind = Saver(tmp_path, -1, True, torch.device("cuda"))
    behind.save("ba1", {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="with a specified index"):
        behind.finish()
