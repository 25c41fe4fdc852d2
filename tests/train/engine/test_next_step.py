"""The next step is launched before the numbers of a step arrive, so a GPU need not wait."""

import math
import os
import signal

import pytest
import torch

from tokenyard_train import Callback
from tokenyard_train.checkpoint import CheckpointError
from tokenyard_train.checkpoint.background import BackgroundWriter
from tokenyard_train.commands.train import train
from tokenyard_train.engine import loop, steps
from tokenyard_train.engine.setup import Setup
from tokenyard_train.engine.signals import Stopped
from tokenyard_train.engine.step_result import StepInFlight
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

    note(steps, "begin_step", lambda _, batch: f"begin {batch}")
    note(steps, "end_step", lambda _, batch, *__: f"end {batch}")
    note(StepInFlight, "wait", lambda _: "wait")
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


def test_the_next_step_begins_before_the_numbers_arrive(config, console, replays, events):
    """But after an evaluation or a save, which need the memory of a step."""
    train(config(max_duration="4ba", eval_interval="3ba", save_interval="2ba"), console, [Ends()])
    assert events == [
        *("begin 0", "end 0", "begin 1", "wait", "train 1"),
        *("end 1", "wait", "train 2", "save"),
        *("begin 2", "end 2", "wait", "train 3", "evaluate", "eval 3"),
        *("begin 3", "end 3", "wait", "train 4", "evaluate", "eval 4", "save"),
    ]


LATE = ["begin 0", "end 0", "wait", "train 1", "begin 1", "end 1", "wait", "train 2"]
"""The events of two steps, if none is launched early."""


def test_without_a_graph_a_report_comes_first(config, console, events):
    """The host takes as long as the device to launch each kernel, or to compute."""
    train(config(max_duration="2ba"), console)
    assert events[:8] == LATE


def test_the_next_step_begins_after_callbacks(config, console, replays, events):
    train(config(max_duration="2ba"), console, [Ends(), Reads()])
    assert events[:8] == LATE


def test_a_model_with_a_buffer_begins_no_step_that_may_be_dropped(config, console, replays, events):
    """A pass may change it, and a checkpoint would hold the change of a dropped step."""

    class Adds(Callback):
        def check(self, config, model, data):
            model.register_buffer("passes", torch.zeros(()))

    train(config(max_duration="2ba"), console, [Adds()])
    assert events[:8] == LATE


def test_no_step_ends_after_a_save_that_failed(config, console, replays, events, monkeypatch):
    def fail(writer):
        raise CheckpointError("ba1 could not be saved")

    monkeypatch.setattr(BackgroundWriter, "failed", True)
    monkeypatch.setattr(BackgroundWriter, "finish", fail)
    with pytest.raises(CheckpointError, match="ba1 could not be saved"):
        train(config(max_duration="3ba"), console)
    assert events == ["begin 0", "end 0", "begin 1", "wait", "train 1"]


def test_a_step_is_reported_if_the_next_one_fails(config, console, replays, events, monkeypatch):
    begin = steps.begin_step

    def fail(setup, batch):
        if batch == 1:
            raise RuntimeError("out of luck")
        return begin(setup, batch)

    monkeypatch.setattr(steps, "begin_step", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(config(max_duration="3ba"), console)
    assert events == ["begin 0", "end 0", "wait", "train 1"]


def test_a_run_that_is_stopped_resumes_as_if_it_had_not_been(
    config, console, replays, events, monkeypatch, tmp_path
):
    """The launched passes of the next step are dropped, and taken again."""
    changes = {"max_duration": "5ba", "save_interval": "100ba"}
    stopped = changes | {"save_folder": str(tmp_path / "stopped")}
    write = Metrics.write

    def stop_after_two(metrics, record):
        write(metrics, record)
        if record["batch"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Metrics, "write", stop_after_two)
    with pytest.raises(Stopped, match="after batch 3 of 5"):
        train(config(**stopped), console)
    monkeypatch.setattr(Metrics, "write", write)
    assert events[-5:] == ["end 2", "begin 3", "wait", "train 3", "save"]
    train(config(**stopped, autoresume=True), console)
    whole = train(config(save_folder=str(tmp_path / "whole"), **changes), console)
    assert tensors(tmp_path / "stopped" / "ba5") == tensors(whole.folder / "ba5")
    assert records(tmp_path / "stopped") == records(whole.folder)


def test_a_signal_within_the_passes_of_a_step_stops_after_it(config, console, monkeypatch):
    """Without a graph, they take most of the time of a step."""
    begin = steps.begin_step

    def signal_in_the_second(setup, batch):
        if batch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return begin(setup, batch)

    monkeypatch.setattr(steps, "begin_step", signal_in_the_second)
    with pytest.raises(Stopped, match="after batch 2 of 5"):
        train(config(max_duration="5ba"), console)


def test_every_second_belongs_to_one_step(config, console, replays, monkeypatch, tmp_path):
    """Two steps are launched in the first, and none in the last."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def take_time(module, name, seconds):
        call = getattr(module, name)

        def taking(*args):
            now[0] += seconds
            return call(*args)

        monkeypatch.setattr(module, name, taking)

    take_time(steps, "begin_step", 1)
    take_time(StepInFlight, "wait", 2)
    train(config(max_duration="4ba"), console)
    lines = Metrics(tmp_path / "run" / "metrics.jsonl").read()
    times = [(line["seconds"], line["remaining_s"]) for line in lines if line["kind"] == "train"]
    assert times == [(4.0, 12.0), (3.0, 7.0), (3.0, 3.3), (2.0, 0.0)]


@pytest.mark.parametrize("spoilt", [False, True])
def test_steps_that_begin_early_give_the_same_run(
    config, console, replays, events, tmp_path, spoilt
):
    """With random numbers in each step, an evaluation, and a step that is skipped."""
    ffn = MODEL["ffn_config"] | {"moe_jitter_eps": 0.1, "moe_bias_update_rate": 0.01}
    changes = {"model": MODEL | {"ffn_config": ffn}, "eval_interval": "4ba", "nonfinite": "skip"}
    spoils = [Spoils()] if spoilt else []
    early, late = (
        train(config(save_folder=str(tmp_path / name), **changes), console, callbacks).folder
        for name, callbacks in (("early", spoils), ("late", [*spoils, Reads()]))
    )
    assert "begin 3" in events[: events.index("skipped 3" if spoilt else "train 3")]
    assert records(early) == records(late)
    assert tensors(early / "ba6") == tensors(late / "ba6")
