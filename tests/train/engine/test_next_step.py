"""The next step is launched before a step is reported, so that a GPU does not wait for the host."""

import math

import pytest

from tokenyard_train import Callback
from tokenyard_train.checkpoint import CheckpointError
from tokenyard_train.checkpoint.background import BackgroundWriter
from tokenyard_train.commands.train import train
from tokenyard_train.engine import loop
from tokenyard_train.engine.setup import Setup
from tokenyard_train.records.metrics import Metrics

from ..conftest import MODEL
from ..run_files import records, tensors


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


class Reads(Callback):
    """May read and change anything after a step."""

    def batch_end(self, run, record):
        pass


class Ends(Callback):
    """Acts after the last step only."""

    def end(self, run):
        pass


class Spoils(Callback):
    """Makes the loss of the third step infinite."""

    def start(self, run):
        self.passes = 0
        run.setup.model.norm.register_forward_hook(self.spoil)

    def spoil(self, module, inputs, output):
        if module.training:
            self.passes += 1
        return output * math.inf if self.passes == 3 and module.training else output


def test_the_next_step_begins_before_a_report(config, console, replays, events):
    """But after an evaluation or a save, which need the memory of a step."""
    train(config(max_duration="4ba", eval_interval="3ba", save_interval="2ba"), console, [Ends()])
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


def test_the_next_step_begins_after_callbacks(config, console, replays, events):
    train(config(max_duration="2ba"), console, [Ends(), Reads()])
    assert events[:6] == ["begin 0", "end 0", "train 1", "begin 1", "end 1", "train 2"]


def test_no_step_begins_after_a_save_that_failed(config, console, replays, events, monkeypatch):
    def fail(writer):
        raise CheckpointError("ba1 could not be saved")

    monkeypatch.setattr(BackgroundWriter, "failed", True)
    monkeypatch.setattr(BackgroundWriter, "finish", fail)
    with pytest.raises(CheckpointError, match="ba1 could not be saved"):
        train(config(max_duration="3ba"), console)
    assert events == ["begin 0", "end 0", "train 1"]


@pytest.mark.parametrize("written", [True, False])
def test_a_step_is_reported_if_the_next_one_fails(
    config, console, replays, events, monkeypatch, written
):
    """The error of the next step is raised, also if the report fails, too."""
    begin = loop.begin_step
    write = Metrics.write

    def fail(setup, batch):
        if batch == 1:
            raise RuntimeError("out of luck")
        return begin(setup, batch)

    def write_or_fail(metrics, record):
        write(metrics, record)
        if not written:
            raise OSError("No space left on device")

    monkeypatch.setattr(loop, "begin_step", fail)
    monkeypatch.setattr(Metrics, "write", write_or_fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(config(max_duration="3ba"), console)
    assert events == ["begin 0", "end 0", "train 1"]


def test_the_remaining_time_has_no_part_of_the_next_step(
    config, console, replays, events, monkeypatch, tmp_path
):
    """It is the mean time of a step so far, times the steps that are left."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    begin = loop.begin_step

    def take_a_second(*args):
        now[0] += 1
        return begin(*args)

    monkeypatch.setattr(loop, "begin_step", take_a_second)
    train(config(max_duration="4ba"), console)
    lines = Metrics(tmp_path / "run" / "metrics.jsonl").read()
    times = [(line["seconds"], line["remaining_s"]) for line in lines if line["kind"] == "train"]
    assert times == [(1.0, 3.0), (1.0, 2.0), (1.0, 1.0), (1.0, 0.0)]


@pytest.mark.parametrize("spoilt", [False, True])
def test_steps_that_begin_early_give_the_same_run(
    config, console, replays, events, tmp_path, spoilt
):
    """With random numbers in each step, an evaluation, and a step that is skipped."""
    ffn = MODEL["ffn_config"] | {"moe_jitter_eps": 0.1}
    changes = {"model": MODEL | {"ffn_config": ffn}, "eval_interval": "4ba", "nonfinite": "skip"}
    spoils = [Spoils()] if spoilt else []
    early, late = (
        train(config(save_folder=str(tmp_path / name), **changes), console, callbacks).folder
        for name, callbacks in (("early", spoils), ("late", [*spoils, Reads()]))
    )
    assert "begin 3" in events[: events.index("skipped 3" if spoilt else "train 3")]
    assert records(early) == records(late)
    assert tensors(early / "ba6") == tensors(late / "ba6")
