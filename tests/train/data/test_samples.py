"""Text becomes samples whose order depends only on the seed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenyard import IGNORED, ConfigError
from tokenyard_train.data import (
    BytesTokenizer,
    HeldOut,
    Mixture,
    Samples,
    build_data,
    python_stdlib,
)
from tokenyard_train.data.schema import Source
from tokenyard_train.data.sources import read_documents
from tokenyard_train.data.sources.files import find_files

TOKENS = np.arange(1000, dtype=np.uint16)


def test_bytes_round_trip():
    tokenizer = BytesTokenizer()
    text = "naïve café — ✓\n"
    ids = tokenizer.encode(text.encode())
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.decode([*ids.tolist(), tokenizer.end]) == text
    assert tokenizer.bytes_in(np.append(ids, tokenizer.end)) == len(text.encode())
    assert tokenizer.decode([0xFF]) == "�"


def test_the_standard_library_is_split_by_file():
    train = python_stdlib(held_out=False)
    held_out = python_stdlib(held_out=True)
    names = ({d.name for d in train}, {d.name for d in held_out})
    assert not names[0] & names[1]
    assert "json/decoder.py" in names[0] | names[1]
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.08
    assert sum(len(d.text) for d in train) > 5e6
    assert not any("/test/" in d.name or "site-packages" in d.name for d in train)
    assert [d.name for d in train] == sorted(names[0])


def test_a_python_without_the_source_of_its_library(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(
        ConfigError,
        match=r"'python_stdlib', but .* holds no source of the library; give files by 'text'",
    ):
        python_stdlib(held_out=False)


def test_files_and_folders_of_text(text):
    (text / "c.bin").write_bytes(b"\xff")
    (text / "below").mkdir()
    (text / "below" / "d.md").write_text("d")
    files = find_files([str(text), str(text / "b.txt")], [".txt", ".md"], "path")
    assert [file.name for file in files] == ["a.txt", "b.txt", "d.md", "b.txt"]


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (
            "nowhere",
            "dataset.path '.*nowhere' does not exist; give a file of text or a folder of them",
        ),
        ("empty", "is a folder without files that end in .txt; see dataset.suffixes"),
        ("latin.txt", "latin.txt is not UTF-8 text; convert it, or leave it out"),
    ],
)
def test_text_that_cannot_be_read(tmp_path, path, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ConfigError, match=sentence):
        list(read_documents(Source(path=str(tmp_path / path), suffixes=[".txt"]), "dataset"))


def test_text_that_is_empty_or_too_short(tmp_path, config):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short")
    loader = {"name": "text", "dataset": {"path": str(tmp_path / "empty.txt")}}
    with pytest.raises(
        ConfigError,
        match=r"train_loader.dataset: there is no text; every document .* is empty or null",
    ):
        build_data(config(train_loader=loader).data())
    loader = {"name": "text", "dataset": {"path": str(tmp_path / "short.txt")}}
    with pytest.raises(
        ConfigError,
        match=r"^train_loader.dataset: the text has 6 tokens; a sample of max_seq_len 24 needs 25",
    ):
        build_data(config(train_loader=loader).data())
    streams = {"name": "text", "dataset": {"streams": {"a": loader["dataset"]}}}
    with pytest.raises(ConfigError, match=r"^train_loader.dataset.streams.a: the text has 6 tok"):
        build_data(config(train_loader=streams).data())


def test_the_error_names_the_loader(config, tmp_path):
    loader = {"name": "text", "dataset": {"path": str(tmp_path / "nowhere")}}
    with pytest.raises(ConfigError, match=r"^eval_loader.dataset.path '.*nowhere' does not exist"):
        build_data(config(eval_loader=loader).data())


def test_documents_are_ended(config, text):
    data = build_data(config().data())
    assert (data.train.tokens == 256).sum() == 2
    assert (
        bytes(data.train.tokens[: (text / "a.txt").stat().st_size].astype(np.uint8))
        == (text / "a.txt").read_bytes()
    )


def test_an_epoch_shows_every_window_once_in_an_order_of_its_own():
    samples = Samples(TOKENS, 10, seed=3)
    epochs = [
        [int(samples[e * len(samples) + i][0]) for i in range(len(samples))] for e in range(3)
    ]
    assert [sorted(e) for e in epochs] == [list(range(0, 990, 10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])
    assert torch.equal(samples[5], Samples(TOKENS, 10, seed=3)[5])
    assert not torch.equal(samples[5], Samples(TOKENS, 10, seed=4)[5])


def test_windows_overlap_by_one_token():
    samples = Samples(TOKENS, 10, seed=0, shuffle=False)
    assert samples[0].tolist() == list(range(11))
    assert samples[1].tolist() == list(range(10, 21))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(0, 9))
def test_ranks_share_the_same_global_order_from_any_step(step, per_rank, world, seed):
    size = 4 * per_rank
    alone = Samples(TOKENS, 10, seed).batch(step, size)
    shares = [Samples(TOKENS, 10, seed).batch(step, size, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat(shares), alone)


def test_a_batch_that_the_ranks_cannot_share():
    with pytest.raises(
        ConfigError, match="global_train_batch_size is 6, which 4 data ranks cannot share evenly"
    ):
        Samples(TOKENS, 10, seed=0).batch(0, 6, rank=0, world=4)


def test_samples_are_counted_upwards():
    with pytest.raises(IndexError, match="and -1 was given"):
        Samples(TOKENS, 10, seed=0)[-1]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 7))
def test_held_out_windows_predict_every_token_but_the_first_once(count, length, batch_size):
    held_out = HeldOut(TOKENS[:count], length, batch_size)
    targets = [held_out.batch(i)[1] for i in range(len(held_out))]
    seen = torch.cat([t.flatten() for t in targets])
    assert seen[seen != IGNORED].tolist() == list(range(1, count)) == held_out.predicted.tolist()


def test_held_out_inputs_precede_their_targets():
    inputs, targets, _ = HeldOut(TOKENS[:8], 5, 2).batch(0)
    assert inputs.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 0, 0]]
    assert targets.tolist() == [[1, 2, 3, 4, 5], [6, 7, *[IGNORED] * 3]]


def test_fewer_held_out_batches_are_spread_over_the_text():
    held_out = HeldOut(TOKENS, 10, batch_size=3, batches=2)
    starts = [0, 160, 330, 500, 660, 830]  # 6 of 100 windows, evenly spaced
    assert len(held_out) == 2
    inputs, targets = (
        torch.cat(parts) for parts in zip(*(held_out.batch(i)[:2] for i in range(2)))
    )
    assert inputs[:, 0].tolist() == starts
    assert targets.flatten().tolist() == held_out.predicted.tolist()
    assert inputs.flatten().tolist() == held_out.previous.tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 7), st.integers(1, 5) | st.just(-1))
def test_counted_pairs_equal_the_predicted_ones(count, length, batch_size, batches):
    held_out = HeldOut(TOKENS[:count], length, batch_size, batches)
    inputs, targets = (
        torch.cat(parts) for parts in zip(*(held_out.batch(i)[:2] for i in range(len(held_out))))
    )
    scored = targets != IGNORED
    assert inputs[scored].tolist() == held_out.previous.tolist()
    assert targets[scored].tolist() == held_out.predicted.tolist()


@pytest.mark.parametrize(("length", "unused"), [(999, 0), (998, 1), (500, 499), (7, 5)])
def test_tokens_after_the_last_whole_window_are_counted(length, unused):
    """Each token but the first of the text is predicted in an epoch, or counted as unused."""
    samples = Samples(TOKENS, length, seed=0)
    assert samples.unused == unused == 999 - len(samples) * length
    rest = f", last {unused} tokens unused" if unused else ""
    assert samples.describe() == f"1,000 tokens, {len(samples)} samples of {length}{rest}"
    mixture = Mixture({"a": samples, "b": samples}, {"a": 1, "b": 1}, seed=0)
    rest = f", {2 * unused} tokens at the ends unused" if unused else ""
    assert mixture.describe().endswith(f" samples of {length}{rest}")


def test_held_out_text_that_is_the_training_text_is_named(config, text, tmp_path, caplog):
    a, b = ({"path": str(text / name)} for name in ("a.txt", "b.txt"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    streams = {"dataset": {"streams": {"x": b, "y": a}}}
    loaders = [
        ({"dataset": a}, {"dataset": a}, "train_loader.dataset"),
        (streams, {"dataset": a}, "train_loader.dataset.streams.y"),
        (*[{"name": "finetuning", "dataset": {"path": str(rows)}}] * 2, "train_loader.dataset"),
        ({"dataset": b}, {"dataset": a}, None),
    ]
    for train, held_out, key in loaders:
        caplog.clear()
        name = {"name": "text"}
        build_data(config(train_loader=name | train, eval_loader=name | held_out).data())
        said = [record.getMessage() for record in caplog.records]
        same = f"eval_loader.dataset has the same text as {key}, so its score is of training text"
        assert [message.startswith(same) for message in said] == [True] * (key is not None)
