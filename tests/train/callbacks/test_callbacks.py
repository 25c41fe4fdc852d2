"""Callbacks of the user's own: objects given to `train`, and entry points of installed distributions."""

import importlib.metadata

import pytest

import tokenyard_train.callbacks.installed
from tokenyard import ConfigError
from tokenyard_train import Callback, train
from tokenyard_train.config import schema


class Notes(Callback):
    """Notes what it is told."""

    def __init__(self, prefix: str = ""):
        if prefix == "bad":
            raise ValueError("prefix is bad")
        self.heard: list[str] = []
        self.prefix = prefix
        Notes.last = self

    def start(self, run):
        self.heard.append(f"{self.prefix}start")

    def batch_end(self, run, record):
        assert record["batch"] == run.batch
        self.heard.append(f"batch {record['batch']}")

    def evaluated(self, run, record):
        self.heard.append(f"scored {record['bits_per_byte'] > 0}")

    def saved(self, run, checkpoint):
        self.heard.append(checkpoint.name)

    def end(self, run):
        self.heard.append("end")


WHOLE = ["start", "batch 1", "batch 2", "ba2", "scored True", "batch 3", "ba3", "end"]


def test_an_object_given_to_train_hears_everything_in_order(config, console):
    notes = Notes()
    train(config(max_duration="3ba", save_interval="2ba"), console, callbacks=[notes])
    assert notes.heard == WHOLE


@pytest.mark.parametrize("save_async", [False, True])
def test_a_run_that_a_callback_ends_is_saved(config, console, save_async):
    class Stop(Notes):
        def batch_end(self, run, record):
            if run.batch == 3:
                run.stop_training()

    stop = Stop()
    train(
        config(max_duration="9ba", save_interval="2ba", save_async=save_async),
        console,
        callbacks=[stop],
    )
    assert [name for name in stop.heard if name.startswith("ba")] == ["ba2", "ba3"]


def test_a_callback_overrides_only_what_it_cares_for(config, console):
    class Last(Callback):
        batch = 0

        def end(self, run):
            self.batch = run.batch

    last = Last()
    train(config(max_duration="2ba"), console, callbacks=[last])
    assert last.batch == 2


@pytest.fixture
def installed(monkeypatch):
    """Offer Notes as the entry point `notes`, as an installed distribution would."""
    point = importlib.metadata.EntryPoint("notes", f"{__name__}:Notes", "tokenyard.callbacks")
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: Notes)

    def entry_points(**asked):
        return importlib.metadata.EntryPoints([point]).select(**asked)

    monkeypatch.setattr(schema, "entry_points", entry_points)
    monkeypatch.setattr(tokenyard_train.callbacks.installed, "entry_points", entry_points)


def test_an_installed_callback_is_named_in_the_config(config, console, installed):
    train(
        config(max_duration="3ba", save_interval="2ba", callbacks={"notes": {"prefix": "my "}}),
        console,
    )
    assert Notes.last.heard == ["my start", *WHOLE[1:]]


def test_options_that_it_refuses_are_named(config, console, installed, tmp_path):
    for options, said in (
        ({"prefix": "bad"}, "prefix is bad"),
        ({"size": 3}, "unexpected keyword argument 'size'"),
    ):
        with pytest.raises(ConfigError, match=rf"callbacks.notes cannot be made of .*{said}"):
            train(config(callbacks={"notes": options}), console)
    assert not (tmp_path / "run").exists()


def test_an_unknown_callback_names_the_installed_ones(config, installed):
    with pytest.raises(
        ConfigError,
        match=r"callbacks.note is not a known key \(did you mean 'notes'\?\).*generate_callback",
    ):
        config(callbacks={"note": {}})


def test_the_package_imports_training_only_when_asked():
    assert tokenyard_train.load_config.__module__ == "tokenyard_train.config.load"
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        tokenyard_train.trian  # noqa: B018
