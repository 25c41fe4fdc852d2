"""A run is resumed on the text and the tokenizer that it was trained on, or not at all."""

import json
import os
import shutil

import numpy as np
import pytest

from tokenyard_train.checkpoint import CheckpointError, read_meta
from tokenyard_train.data.packing import pack
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.engine import resume as module
from tokenyard_train.engine.agreement import check_data
from tokenyard_train.engine.state import Position

from ..data.test_mds import write as write_mds
from .test_resume import resumed, saved


def write_text(folder, text):
    (folder / "a.txt").write_text(text * 40)
    return {"path": str(folder / "a.txt")}


def write_jsonl(folder, text):
    rows = (json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(40))
    (folder / "a.jsonl").write_text("".join(rows))
    return {"path": str(folder / "a.jsonl")}


def write_packed(folder, text):
    shutil.rmtree(folder / "packed", ignore_errors=True)
    documents = [text.encode()] * 40
    pack(folder / "packed", lambda: documents, TokenizerConfig(), [], 1, lambda done: None)
    return {"packed": str(folder / "packed")}


def write_mds_text(folder, text):
    samples = [[f"{i} {text}".encode()] for i in range(40)]
    write_mds(folder / "mds", [samples], ["text"], ["str"], [None])
    return {"local": str(folder / "mds")}


def write_mds_ids(folder, text):
    ids = np.frombuffer(text.encode(), dtype=np.uint8)[:24].astype("<i8").tobytes()
    write_mds(folder / "mds", [[[ids]] * 40], ["tokens"], ["bytes"], [None])
    return {"local": str(folder / "mds")}


def write_streams(folder, text):
    (folder / "other.txt").write_text("something else " * 40)
    return {
        "streams": {"one": {"path": str(folder / "other.txt")}, "two": write_text(folder, text)}
    }


WRITERS = [write_text, write_jsonl, write_packed, write_mds_text, write_mds_ids, write_streams]
TEXT = "Pack my box with five dozen liquor jugs. "


@pytest.mark.parametrize("writer", WRITERS)
def test_changed_text_is_refused_and_equal_text_is_not(build, tmp_path, writer):
    loader = {"name": "text", "dataset": writer(tmp_path, TEXT)}
    saved(build(train_loader=loader), Position(batch=2))
    writer(tmp_path, TEXT)
    assert resumed(build(train_loader=loader, autoresume=True)) == Position(batch=2)
    for changed in (TEXT.replace("box", "bag"), TEXT + "And more. "):
        writer(tmp_path, changed)
        if writer is write_mds_ids and changed.startswith(TEXT):
            continue  # its first 24 ids are equal
        key = r"train_loader.dataset" + (r".streams.two" if writer is write_streams else "")
        with pytest.raises(
            CheckpointError,
            match=rf"^{key} has other content than checkpoint .*ba2 was trained on, .*bring the fo",
        ):
            resumed(build(train_loader=loader, autoresume=True))
    writer(tmp_path, TEXT)
    assert resumed(build(train_loader=loader, autoresume=True)) == Position(batch=2)


def test_a_file_that_is_only_touched_is_equal(build, tmp_path):
    loader = {"name": "text", "dataset": write_text(tmp_path, TEXT)}
    saved(build(train_loader=loader))
    os.utime(tmp_path / "a.txt", (1, 1))
    resumed(build(train_loader=loader, autoresume=True))


def test_a_replaced_tokenizer_is_refused(build, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")

    def write(order):
        vocab = {token: i for i, token in enumerate(order)}
        model = tokenizers.models.WordLevel(vocab, unk_token="<unk>")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.save(str(tmp_path / "tokenizer.json"))

    write(["<unk>", "</s>", "times", "one"])
    tokenizer = {"name": str(tmp_path / "tokenizer.json"), "eos_token": "</s>"}
    saved(build(tokenizer=tokenizer))
    resumed(build(tokenizer=tokenizer, autoresume=True))
    write(["<unk>", "</s>", "one", "times"])
    with pytest.raises(CheckpointError, match=r"^tokenizer has other content than checkpoint "):
        resumed(build(tokenizer=tokenizer, autoresume=True))


def test_a_checkpoint_of_an_older_version_is_resumed_with_a_warning(build, monkeypatch, caplog):
    saved(build(), Position(batch=2))
    monkeypatch.setattr(
        module, "read_meta", lambda path: {k: v for k, v in read_meta(path).items() if k != "data"}
    )
    assert resumed(build(autoresume=True)) == Position(batch=2)
    assert "does not record its text, so it is not compared" in caplog.text


def test_held_out_text_may_change(build, tmp_path, text):
    saved(build())
    (text / "c.txt").write_text("other held-out text, long enough to be scored")
    loader = {"name": "text", "dataset": {"path": str(text / "c.txt")}}
    other = tmp_path / "b.txt"
    shutil.move(text / "c.txt", other)
    loader["dataset"]["path"] = str(other)
    resumed(build(eval_loader=loader, autoresume=True))


def test_a_stream_that_the_checkpoint_lacks_is_other_content(tmp_path):
    with pytest.raises(CheckpointError, match=r"^b has other content"):
        check_data({"a": "1", "b": "2"}, tmp_path, {"a": "1"})


def test_the_command_refuses_text_that_has_changed(tmp_path, tokenyard, settings, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loader = {"name": "text", "dataset": write_text(tmp_path, TEXT)}
    config = json.dumps(settings | {"train_loader": loader, "max_duration": "1ba"})
    (tmp_path / "c.yaml").write_text(config)
    assert tokenyard("train", "c.yaml")[0] == 0
    write_text(tmp_path, TEXT + "x")
    code, _, stderr = tokenyard("train", "c.yaml", "autoresume=true", "max_duration=2ba")
    assert code == 2
    assert "train_loader.dataset has other content" in " ".join(stderr.split())
