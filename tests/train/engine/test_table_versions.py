"""A run reads the version of a Delta table that it started with, whatever the table holds later."""

import pytest
import torch

from tokenyard_train.checkpoint import CheckpointError, read_meta
from tokenyard_train.commands.check import check
from tokenyard_train.commands.train import train
from tokenyard_train.config import read_config

from ..commands.test_every_loader import tensors_of
from .test_loop import killed_run

pyarrow = pytest.importorskip("pyarrow")
deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed")


def write(folder, word, mode="error"):
    texts = [f"{i} {word} times 3 is {i * 3}" for i in range(60)]
    deltalake.write_deltalake(str(folder), pyarrow.table({"body": texts}), mode=mode)


@pytest.fixture
def table(tmp_path):
    write(tmp_path / "table", "eggs")
    write(tmp_path / "table", "pans", mode="overwrite")
    return tmp_path / "table"


@pytest.fixture
def loader(table):
    return {"name": "text", "dataset": {"delta": str(table), "text_key": "body"}}


def test_a_killed_run_ends_as_if_the_table_had_not_changed(
    settings, console, tmp_path, table, loader, one_thread
):
    settings |= {"train_loader": loader, "eval_loader": loader, "eval_loaders": {"more": loader}}
    settings |= {"max_duration": "14ba", "save_interval": "1ba", "autoresume": True}
    killed, whole = (
        read_config(settings | {"save_folder": str(tmp_path / name)})
        for name in ("killed", "whole")
    )
    straight = train(whole, console)
    killed_run(settings, tmp_path / "killed", lines=6)
    kept = {path.name for path in (tmp_path / "killed").glob("ba*")}
    assert "ba2" in kept
    assert "ba14" not in kept
    write(table, "cats", mode="overwrite")
    resumed = train(killed, console)
    assert (resumed.train_loss, resumed.bits_per_byte) == pytest.approx(
        (straight.train_loss, straight.bits_per_byte), abs=0
    )
    expected = tensors_of(straight.folder / "ba14")
    tensors = tensors_of(resumed.folder / "ba14")
    assert expected.keys() == tensors.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    saved = read_meta(resumed.folder / "ba14")["config"]
    loaders = (saved["train_loader"], saved["eval_loader"], saved["eval_loaders"]["more"])
    assert [each["dataset"]["version"] for each in loaders] == [1, 1, 1]


def test_a_new_run_reads_the_newest_version(config, console, table, loader):
    train(config(train_loader=loader, max_duration="1ba"), console)
    write(table, "cats", mode="overwrite")
    again = config(train_loader=loader, max_duration="1ba", save_overwrite=True)
    folder = train(again, console).folder
    assert read_meta(folder / "ba1")["config"]["train_loader"]["dataset"]["version"] == 2


def test_another_version_is_refused_and_versions_of_streams_are_recorded(config, console, table):
    source = {"delta": str(table), "text_key": "body"}
    streams = {"old": source | {"version": 0}, "new": source}
    loader = {"name": "text", "dataset": {"streams": streams}}
    folder = train(config(train_loader=loader, max_duration="1ba"), console).folder
    saved = read_meta(folder / "ba1")["config"]["train_loader"]["dataset"]["streams"]
    assert {name: stream["version"] for name, stream in saved.items()} == {"old": 0, "new": 1}
    streams["new"] = source | {"version": 0}
    with pytest.raises(
        CheckpointError, match=r"streams.new.version is 0, but checkpoint .* was made with 1"
    ):
        train(config(train_loader=loader, max_duration="2ba", autoresume=True), console)


def test_check_prints_the_versions(config, console, loader, table):
    console.quiet = False
    check(config(train_loader=loader), console)
    assert f"{table}, version 1" in console.export_text().replace("\n", "")
