"""Trackers receive the records of metrics.jsonl, and their failures do not stop training."""

import json
import logging
import socket
import sys
import time

import pytest
import yaml

from tokenyard import ConfigError
from tokenyard_train.commands.train import train
from tokenyard_train.records.trackers import Trackers, scalars
from tokenyard_train.records.trackers._build import _identities


@pytest.fixture
def run(config, console, tmp_path):
    """Train with loggers; return the training records of metrics.jsonl by batch."""

    def call(loggers, **changes):
        train(config(loggers=loggers, eval_interval="3ba", **changes), console)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return call


def of(records, kind):
    return {r["batch"]: r for r in records if r["kind"] == kind}


def test_records_become_numbers_with_names():
    record = {
        "kind": "train",
        "batch": 7,
        "loss": 2,
        "load": [[0.25, 0.75]],
        "routing": [{"entropy": 0.5}],
    }
    assert scalars(record) == {
        "train/loss": 2.0,
        "train/load/0/0": 0.25,
        "train/load/0/1": 0.75,
        "train/routing/0/entropy": 0.5,
    }


def events(folder):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = accumulators.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def test_a_tensorboard_event_file_is_read_back(run, tmp_path):
    pytest.importorskip("tensorboard")
    records = run({"tensorboard": {"flush_interval": 1}})
    event_file = events(tmp_path / "run" / "tensorboard")
    losses = {e.step: e.value for e in event_file.Scalars("train/loss")}
    assert losses == pytest.approx(
        {batch: r["loss"] for batch, r in of(records, "train").items()}, rel=1e-6
    )
    scores = {e.step: e.value for e in event_file.Scalars("eval/bits_per_byte")}
    assert scores == pytest.approx(
        {batch: r["bits_per_byte"] for batch, r in of(records, "eval").items()}, rel=1e-6
    )
    assert "train/routing/0/entropy" in event_file.Tags()["scalars"]


def test_a_resumed_run_shows_each_step_once_in_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboard")
    loggers = {"tensorboard": {"flush_interval": 1}}
    run(loggers, max_duration="5ba", save_interval="2ba")
    # As if the run was killed after the last step, before it was saved.
    (tmp_path / "run" / "ba5").rename(tmp_path / "lost")
    records = run(loggers, max_duration="8ba", autoresume=True)
    steps = [e.step for e in events(tmp_path / "run" / "tensorboard").Scalars("train/loss")]
    assert steps == list(of(records, "train")) == list(range(1, 9))


@pytest.mark.parametrize("killed", [False, True])
def test_a_new_run_in_a_used_folder_shows_only_its_steps_in_tensorboard(run, tmp_path, killed):
    """The run before was overwritten, or killed before its first checkpoint."""
    pytest.importorskip("tensorboard")
    loggers = {"tensorboard": {"flush_interval": 1}}
    run(loggers, max_duration="3ba", eval_first=True)
    if killed:
        (tmp_path / "run" / "ba3").rename(tmp_path / "lost")
    again = {"autoresume": True} if killed else {"save_overwrite": True}
    records = run(loggers, max_duration="2ba", eval_first=True, **again)
    event_file = events(tmp_path / "run" / "tensorboard")
    for kind, tag in (("train", "train/loss"), ("eval", "eval/loss")):
        assert [e.step for e in event_file.Scalars(tag)] == list(of(records, kind))


def test_a_run_of_mlflow_is_read_back(run, tmp_path, config):
    mlflow = pytest.importorskip("mlflow")
    records = run({"mlflow": {"experiment_name": "yard", "tags": {"team": "one"}}})
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (logged,) = client.search_runs([client.get_experiment_by_name("yard").experiment_id])
    assert (logged.info.run_name, logged.info.status, logged.data.tags["team"]) == (
        "run",
        "FINISHED",
        "one",
    )
    history = {m.step: m.value for m in client.get_metric_history(logged.info.run_id, "train/loss")}
    assert history == {batch: r["loss"] for batch, r in of(records, "train").items()}
    assert logged.data.params["optimizer.lr"] == "0.01"
    assert logged.data.metrics["eval/bits_per_byte"] == of(records, "eval")[6]["bits_per_byte"]


def test_a_resumed_run_continues_the_same_mlflow_run(run, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    run({"mlflow": {}}, max_duration="5ba", save_interval="2ba")
    (tmp_path / "run" / "ba5").rename(tmp_path / "lost")
    run({"mlflow": {}}, max_duration="8ba", autoresume=True)
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (logged,) = client.search_runs([client.get_experiment_by_name("tokenyard").experiment_id])
    steps = [m.step for m in client.get_metric_history(logged.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(1, 9))


def leveldb_records(content):
    """Yield the records of a W&B file: a header of 7 bytes, then LevelDB's log of 32 KiB blocks."""
    offset = 7
    parts = b""
    while offset + 7 <= len(content):
        if 32768 - offset % 32768 < 7:  # the rest of the block is too short for a record header
            offset += 32768 - offset % 32768
            continue
        size = int.from_bytes(content[offset + 4 : offset + 6], "little")
        kind = content[offset + 6]
        parts += content[offset + 7 : offset + 7 + size]
        offset += 7 + size
        if kind in (1, 4):  # a full record, or its last part
            yield parts
            parts = b""


def test_a_wandb_run_is_written_offline(run, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    records_pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    records = run({"wandb": {"project": "yard"}})
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    want = {batch: r["loss"] for batch, r in of(records, "train").items()}
    end = time.monotonic() + 60
    while (losses := wandb_losses(path, records_pb)) != want and time.monotonic() < end:
        time.sleep(0.2)  # wandb writes the file from another process
    assert losses == want


def wandb_losses(path, records_pb):
    """Return the losses that a W&B file holds so far, by batch."""
    from google.protobuf.message import DecodeError

    losses = {}
    for data in leveldb_records(path.read_bytes()):
        record = records_pb.Record()
        try:
            record.ParseFromString(data)
        except DecodeError:  # the last record is incomplete
            break
        values = {
            i.nested_key[0] if i.nested_key else i.key: i.value_json for i in record.history.item
        }
        if "train/loss" in values:
            losses[record.history.step.num] = json.loads(values["train/loss"])
    return losses


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_library_is_named_before_training(run, name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    sentence = (
        rf"loggers.{name} needs {name}, which is not installed; "
        rf'pip install "tokenyard-train\[{name}'
    )
    with pytest.raises(ConfigError, match=sentence):
        run({name: {}})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_tracker_that_cannot_be_started_is_named(run):
    pytest.importorskip("mlflow")
    with pytest.raises(ConfigError, match=r"loggers.mlflow cannot be started: "):
        run({"mlflow": {"tracking_uri": "carrier-pigeon://coop"}})


@pytest.fixture
def silent_server():
    """The address of a server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("server", ["dead", "silent"])
def test_a_server_that_does_not_answer_is_refused_before_the_first_step(
    server, silent_server, tokenyard, settings, tmp_path, monkeypatch
):
    pytest.importorskip("mlflow")
    for name in ("MAX_RETRIES", "TIMEOUT"):  # what the tracker sets is undone, too
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "1")
        if server == "dead":
            monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    uri = silent_server if server == "silent" else "http://127.0.0.1:9"
    start = time.monotonic()
    code, _, error = tokenyard("train", str(path), f"loggers.mlflow.tracking_uri={uri}")
    assert time.monotonic() - start < 10
    assert code == 2
    assert error.startswith("error: loggers.mlflow cannot be started: MlflowException: ")
    assert error.count("\n") == 1
    assert not list((tmp_path / "run").glob("ba*"))


def test_without_trackers_no_number_is_looked_at():
    """A record of 48 layers of 128 experts has more than 6,000."""

    class Unread:
        def __float__(self):
            raise AssertionError("it was looked at")

    record = {"kind": "train", "batch": 1, "loss": Unread()}
    with pytest.raises(AssertionError, match="it was looked at"):
        scalars(record)
    Trackers({}).record(record)


def test_a_tracker_that_fails_is_left_out_with_one_warning(caplog):
    class Failing:
        calls = 0

        def log(self, numbers, step):
            self.calls += 1
            raise ConnectionError("no such\nserver")

        def finish(self, failed):
            raise AssertionError("it was left out")

    class Kept:
        seen: list[int] = []
        failed = None

        def log(self, numbers, step):
            self.seen.append(step)

        def finish(self, failed):
            self.failed = failed

    failing = Failing()
    kept = Kept()
    trackers = Trackers({"failing": failing, "kept": kept})
    with caplog.at_level(logging.WARNING, "tokenyard"):
        for batch in (1, 2, 3):
            trackers.record({"kind": "train", "batch": batch, "loss": 1.0})
        trackers.finish(True)
    assert caplog.messages == [
        "loggers.failing failed and is left out from here on: ConnectionError: no such server"
    ]
    assert (failing.calls, kept.seen, kept.failed) == (1, [1, 2, 3], True)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 200_000, b'{"wandb": 5}'])
def test_damaged_identities_are_a_warning(content, tmp_path, caplog):
    (tmp_path / "trackers.json").write_bytes(content)
    assert _identities(tmp_path) == {}
    assert "is damaged; the run gets new ids in its trackers" in caplog.text
