"""A run's folder that lacks what its checkpoint counts on, and checkpoints that vanish."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from tokenyard_train import train
from tokenyard_train.checkpoint import CheckpointError, checkpoints, write_checkpoint
from tokenyard_train.checkpoint import store as module
from tokenyard_train.checkpoint.store import read_newest
from tokenyard_train.commands.load_model import load_trained
from tokenyard_train.records.metrics import Metrics


@pytest.fixture
def run(config, console):
    """The folder of a run of four steps with a checkpoint each."""
    return train(config(max_duration="4ba", save_interval="1ba"), console).folder


def go_on(config, console, **changes):
    return train(config(max_duration="5ba", autoresume=True, **changes), console)


@pytest.fixture
def unlistable(monkeypatch):
    """Folders named `run` cannot be listed, as for a user without the right to read them."""
    listed = Path.iterdir

    def iterdir(self):
        if self.name == "run":
            raise PermissionError(13, "Permission denied", str(self))
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)


def test_a_folder_that_cannot_be_listed_is_refused(config, console, run, unlistable, tmp_path):
    size = (run / "metrics.jsonl").stat().st_size
    sentence = r"folder .*run cannot be listed \(Permission denied\).*the right to read it"
    with pytest.raises(CheckpointError, match=sentence):
        go_on(config, console)
    with pytest.raises(CheckpointError, match=sentence):
        load_trained(run, "cpu")
    with pytest.raises(CheckpointError, match=sentence):
        train(config(load_path=str(run), save_folder=str(tmp_path / "b")), console)
    assert (run / "metrics.jsonl").stat().st_size == size


def test_metrics_without_a_checkpoint_are_kept_aside(config, console, run, caplog):
    before = (run / "metrics.jsonl").read_bytes()
    for checkpoint in checkpoints(run):
        shutil.rmtree(checkpoint)
    go_on(config, console)
    assert "no checkpoint in" in caplog.text
    assert "starting anew at batch 0" in caplog.text
    assert (run / "metrics.old.jsonl").read_bytes() == before
    batches = [r["batch"] for r in Metrics(run / "metrics.jsonl").read() if r["kind"] == "train"]
    assert batches == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("keep", [0, 100, None])
def test_metrics_shorter_than_the_checkpoint_counts_are_named(config, console, run, caplog, keep):
    path = run / "metrics.jsonl"
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:keep])
    result = go_on(config, console)
    assert "metrics.jsonl has" in caplog.text
    assert "records of earlier steps are lost" in caplog.text
    assert result.batches == 5
    assert [r["batch"] for r in Metrics(path).read() if r["kind"] == "train"] == [5]


@pytest.mark.parametrize("damage", [b"{", b"[1]", b"\xff\xfe", b"[" * 100000, b'{"a": 1}'])
def test_a_damaged_line_is_named_and_left_out(config, console, run, caplog, damage):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1] = damage.ljust(len(lines[1]))[: max(len(lines[1]), len(damage))]
    path.write_bytes(b"\n".join(lines) + b"\n")
    if path.stat().st_size > 100000:
        return  # rewinding would cut the file, since it is longer than the checkpoint counts
    assert go_on(config, console).batches == 5
    assert "metrics.jsonl: line 2 is damaged" in caplog.text
    kept = [r["batch"] for r in Metrics(path).read() if r["kind"] == "train"]
    assert kept == [1, 3, 4, 5]


def test_an_undamaged_folder_has_no_warning(config, console, run, caplog):
    with caplog.at_level(logging.WARNING, "tokenyard"):
        go_on(config, console, scheduler={"t_max": "1dur"})
    (message,) = caplog.messages  # of the longer run, which this test asks for
    assert "with other values: max_duration is '5ba'" in message


def damaged(folder):
    (folder / "run.json").write_text("{}")


def linked(folder):
    shutil.move(folder, folder.parent / "elsewhere")
    (folder.parent / "elsewhere" / "manifest.json").unlink()
    folder.symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("break_it", [damaged, linked])
def test_the_last_good_checkpoint_is_good(run, monkeypatch, break_it):
    break_it(run / "ba4")
    sentence = r"ba9 could not be saved \(.*\); the last good checkpoint is .*ba3$"
    with pytest.raises(CheckpointError, match=sentence):
        write_checkpoint(run, "ba9", {}, {"not": object()} and {"x": _Full()}, keep=-1)


class _Full(dict):
    """JSON whose writing ends like one on a full disk."""

    def __bool__(self):
        return True

    def items(self):
        raise OSError(28, "No space left on device")


def test_a_link_among_old_checkpoints_is_unlinked(run):
    shutil.move(run / "ba2", run.parent / "kept")
    (run / "ba2").symlink_to(run.parent / "kept")
    write_checkpoint(run, "ba5", {}, {}, keep=1)
    assert [path.name for path in checkpoints(run)] == ["ba5"]
    assert (run.parent / "kept" / "run.json").exists()


def test_a_reader_whose_checkpoint_is_pruned_takes_the_newest(run, caplog):
    seen = []

    def read(checkpoint):
        seen.append(checkpoint.name)
        if len(seen) == 1:
            shutil.rmtree(checkpoint)
        return json.loads((checkpoint / "run.json").read_text())["batch"]

    assert read_newest(run, read) == 3
    assert seen == ["ba4", "ba3"]
    assert "was deleted while it was read" in caplog.text


def test_a_checkpoint_that_is_pruned_while_it_is_verified(run, monkeypatch):
    find = module.find_fault

    def find_fault(folder):
        if folder.name == "ba4":
            shutil.rmtree(folder)
        return find(folder)

    monkeypatch.setattr(module, "find_fault", find_fault)
    assert module.newest_good(run).name == "ba3"


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_checkpoint_that_is_a_link_to_nothing_or_a_file_is_damaged(config, console, run, kind):
    """It is no reason to start anew: of several, the one before it is taken."""
    for path in checkpoints(run)[2:]:
        shutil.rmtree(path)
        path.symlink_to("nowhere") if kind == "link" else path.write_text("")
    assert load_trained(run, "cpu").path.name == "ba2"
    for path in checkpoints(run)[:2]:
        shutil.rmtree(path)
    sentence = r"no checkpoint in .*run is good: checkpoint .*ba4: manifest.json is missing"
    with pytest.raises(CheckpointError, match=sentence):
        go_on(config, console)
    train(config(save_overwrite=True, max_duration="1ba"), console)
    assert [path.name for path in checkpoints(run)] == ["ba1"]
