"""The next step begins before a step is reported, so that a GPU does not wait for the report."""

import pytest

from tokenyard_train import Callback
from tokenyard_train.commands.train import train
from tokenyard_train.engine import loop
from tokenyard_train.engine.setup import Setup
from tokenyard_train.records.metrics import Metrics


@pytest.fixture
def replays(monkeypatch):
    """Let runs behave as with a CUDA graph, which needs a GPU."""
    monkeypatch.setattr(Setup, "replays", True)


@pytest.fixture
def events(monkeypatch):
    """What a run does, in order."""
    events = []

    def note(module, name, event):
        call = getattr(module, name)

        def noting(*args, **kwargs):
            events.append(event(*args))
            return call(*args, **kwargs)

        monkeypatch.setattr(module, name, noting)

    note(loop, "begin_step", lambda _, batch: f"begin {batch}")
    note(loop, "end_step", lambda _, batch, *__: f"end {batch}")
    note(loop, "evaluate", lambda *_: "evaluate")
    note(loop, "save", lambda *_: "save")
    note(Metrics, "write", lambda _, record: f"{record['kind']} {record['batch']}")
    return events


def test_the_next_step_begins_before_a_report(config, console, replays, events):
    """But after an evaluation or a save, which need the memory of a step."""
    train(config(max_duration="4ba", eval_interval="3ba", save_interval="2ba"), console)
    assert events == [
        *("begin 0", "end 0", "begin 1", "train 1"),
        *("end 1", "train 2", "save"),
        *("begin 2", "end 2", "train 3", "evaluate", "eval 3"),
        *("begin 3", "end 3", "train 4", "evaluate", "eval 4", "save"),
    ]


def test_without_a_graph_a_report_comes_first(config, console, events):
    """The host takes as long as the device to launch each kernel, or to compute."""
    train(config(max_duration="2ba"), console)
    assert events[:6] == ["begin 0", "end 0", "train 1", "begin 1", "end 1", "train 2"]


class Reads(Callback):
    """May read and change anything between two steps."""


def test_the_next_step_begins_after_callbacks(config, console, replays, events):
    train(config(max_duration="2ba"), console, [Reads()])
    assert events[:6] == ["begin 0", "end 0", "train 1", "begin 1", "end 1", "train 2"]


def test_a_step_is_reported_if_the_next_one_fails(config, console, replays, events, monkeypatch):
    begin = loop.begin_step

    def fails(setup, batch):
        if batch == 1:
            raise RuntimeError("out of luck")
        return begin(setup, batch)

    monkeypatch.setattr(loop, "begin_step", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(config(max_duration="3ba"), console)
    assert events == ["begin 0", "end 0", "train 1"]


def test_steps_that_begin_early_give_the_same_run(config, console, replays, tmp_path):
    runs = [
        train(config(save_folder=str(tmp_path / name)), console, callbacks)
        for name, callbacks in (("early", []), ("late", [Reads()]))
    ]
    early, late = ((r.train_loss, r.bits_per_byte) for r in runs)
    assert early == late
