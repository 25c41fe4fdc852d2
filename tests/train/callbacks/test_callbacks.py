"""The user's callbacks: objects passed to `train`, and entry points of distributions."""

import importlib.metadata

import pytest

import tokenyard_train.callbacks.installed
from tokenyard import ConfigError, TokenyardError
from tokenyard_train import Callback, train
from tokenyard_train.config import callbacks as schema


class Recorder(Callback):
    """Records the calls that it receives."""

    def __init__(self, prefix: str = ""):
        if prefix == "bad":
            raise ValueError("prefix is bad")
        self.calls: list[str] = []
        self.prefix = prefix
        Recorder.last = self

    def start(self, run):
        self.calls.append(f"{self.prefix}start")

    def batch_end(self, run, record):
        assert record["batch"] == run.batch
        self.calls.append(f"batch {record['batch']}")

    def evaluated(self, run, record):
        self.calls.append(f"scored {record['bits_per_byte'] > 0}")

    def saved(self, run, checkpoint):
        self.calls.append(checkpoint.name)

    def end(self, run):
        self.calls.append("end")


WHOLE = ["start", "batch 1", "batch 2", "ba2", "scored True", "batch 3", "ba3", "end"]


def test_an_object_passed_to_train_receives_all_calls_in_order(config, console):
    recorder = Recorder()
    train(config(max_duration="3ba", save_interval="2ba"), console, callbacks=[recorder])
    assert recorder.calls == WHOLE


@pytest.mark.parametrize("save_async", [False, True])
def test_a_run_that_a_callback_ends_is_saved(config, console, save_async):
    class Stop(Recorder):
        def batch_end(self, run, record):
            if run.batch == 3:
                run.stop_training()

    stop = Stop()
    train(
        config(max_duration="9ba", save_interval="2ba", save_async=save_async),
        console,
        callbacks=[stop],
    )
    assert [name for name in stop.calls if name.startswith("ba")] == ["ba2", "ba3"]
    assert "scored True" in stop.calls
    assert stop.calls[-1] == "end"


@pytest.mark.parametrize("save_async", [False, True])
def test_a_run_may_be_stopped_when_a_checkpoint_was_saved(config, console, save_async):
    """In the background a checkpoint is reported when the next one is due."""

    class Stop(Recorder):
        def saved(self, run, checkpoint):
            super().saved(run, checkpoint)
            run.stop_training()

    stop = Stop()
    settings = config(max_duration="9ba", save_interval="2ba", save_async=save_async)
    result = train(settings, console, callbacks=[stop])
    expected = ["ba2", "ba4"] if save_async else ["ba2"]
    assert [name for name in stop.calls if name.startswith("ba") and name[2].isdigit()] == expected
    assert result.batches == int(expected[-1][2:])


def test_a_run_cannot_be_stopped_before_its_first_step(config, console):
    class Stop(Callback):
        def start(self, run):
            run.stop_training()

    with pytest.raises(TokenyardError, match="before a step was taken; call it in batch_end"):
        train(config(), console, callbacks=[Stop()])


def test_a_callback_may_override_one_method(config, console):
    class Last(Callback):
        batch = 0

        def end(self, run):
            self.batch = run.batch

    last = Last()
    train(config(max_duration="2ba"), console, callbacks=[last])
    assert last.batch == 2


@pytest.fixture
def installed(monkeypatch):
    """Provide Recorder as the entry point `notes`, like an installed distribution."""

    class Point(importlib.metadata.EntryPoint):
        def load(self):
            return Recorder

    point = Point("notes", f"{__name__}:Recorder", "tokenyard.callbacks")

    def entry_points(**query):
        return importlib.metadata.EntryPoints([point]).select(**query)

    monkeypatch.setattr(schema, "entry_points", entry_points)
    monkeypatch.setattr(tokenyard_train.callbacks.installed, "entry_points", entry_points)


def test_an_installed_callback_is_named_in_the_config(config, console, installed):
    train(
        config(max_duration="3ba", save_interval="2ba", callbacks={"notes": {"prefix": "my "}}),
        console,
    )
    assert Recorder.last.calls == ["my start", *WHOLE[1:]]


def test_refused_options_are_named(config, console, installed, tmp_path):
    for options, said in (
        ({"prefix": "bad"}, "prefix is bad"),
        ({"size": 3}, "unexpected keyword argument 'size'"),
    ):
        with pytest.raises(ConfigError, match=rf"callbacks.notes cannot be made of .*{said}"):
            train(config(callbacks={"notes": options}), console)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [3, True, "bad", ["prefix"]])
def test_options_that_are_no_mapping_are_named(config, installed, options):
    with pytest.raises(ConfigError, match=r"callbacks.notes is .*; give a mapping of its options"):
        config(callbacks={"notes": options})


def test_an_unknown_callback_names_the_installed_ones(config, installed):
    with pytest.raises(
        ConfigError,
        match=r"callbacks.note is not a known key \(did you mean 'notes'\?\).*generate_callback",
    ):
        config(callbacks={"note": {}})


def test_the_package_imports_training_lazily():
    assert tokenyard_train.load_config.__module__ == "tokenyard_train.config.load"
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        tokenyard_train.trian  # noqa: B018


@pytest.mark.parametrize(
    ("losses", "options", "last"),
    [
        ([5, 4, 3, 3, 3, 3], {"patience": "1ba"}, 5),
        ([5, 4, 4, 4, 3, 3], {"patience": "2ba"}, 6),
        ([5, 4.5, 4.2, 4, 3, 2], {"patience": "1ba", "min_delta": 1}, 3),
        ([5, 5, 5, 5, 5, 5], {"patience": 1}, 4),  # two steps an epoch
    ],
)
def test_early_stopper(config, console, monkeypatch, losses, options, last):
    """Held-out losses are given; the run ends where Composer's EarlyStopper ends it."""
    scores = iter(losses)

    def score(setup, batch, kind):
        return {"kind": kind, "batch": batch, "loss": next(scores), "bits_per_byte": 1.0}

    monkeypatch.setattr("tokenyard_train.engine.loop.evaluate", score)
    module = "tokenyard_train.callbacks.early_stopper.epoch_batches"
    monkeypatch.setattr(module, lambda config, data: 2)
    settings = config(eval_interval="1ba", callbacks={"early_stopper": options})
    assert train(settings, console).batches == last


def test_early_stopper_names_what_it_watches(config, console):
    options = {"dataloader_label": "code", "monitor": "LanguageCrossEntropy", "comp": "less"}
    with pytest.raises(ConfigError, match="labels of held-out text are: eval; give one"):
        train(config(callbacks={"early_stopper": options}), console)
    with pytest.raises(ConfigError, match="whose LanguageCrossEntropy falls; say comp: less"):
        config(callbacks={"early_stopper": {"monitor": "LanguageCrossEntropy"}})


def test_every_held_out_text_is_scored_before_and_after(config, console, text):
    loader = {"name": "text", "dataset": {"path": str(text / "a.txt")}}
    seen = []

    class Watch(Recorder):
        def evaluated(self, run, record):
            seen.append((record["kind"], record["batch"], record["loss"] > 0))

    settings = config(max_duration="1ba", eval_first=True, eval_loaders={"sums": loader})
    train(settings, console, callbacks=[Watch()])
    assert seen == [(kind, batch, True) for batch in (0, 1) for kind in ("eval", "eval/sums")]
