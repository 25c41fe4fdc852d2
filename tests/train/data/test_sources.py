"""Read documents from files and datasets in a fixed order, with one-sentence errors."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest

from tokenyard import ConfigError
from tokenyard_models.strict_config import parse
from tokenyard_train.config import read_config
from tokenyard_train.data import build_data
from tokenyard_train.data.schema import Source, TextDataset, TokenizerConfig
from tokenyard_train.data.sources import describe_source, read_documents

DOCUMENTS = ["one, naïve", "two\nlines", "", "four ✓"]
READ = [text.encode() for text in DOCUMENTS if text]


def read(**source: object) -> list[bytes]:
    return list(read_documents(Source(**source), "dataset"))


@pytest.fixture
def lines():
    return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in DOCUMENTS).encode() + b"\n"


def test_jsonl_plain_and_compressed(tmp_path, lines):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    assert read(path=str(tmp_path)) == READ * 3
    assert read(path=[str(tmp_path / "c.jsonl.zst"), str(tmp_path / "a.jsonl")]) == READ * 2


def test_parquet_row_by_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"body": [*DOCUMENTS, None], "n": list(range(5))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert read(path=str(tmp_path), text_key="body") == READ
    with pytest.raises(ConfigError, match=r"has no column 'text'; it has body, n; see text_key"):
        read(path=str(tmp_path))
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match=r"b.parquet is not a parquet file: "):
        read(path=str(tmp_path / "b.parquet"))


@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_datasets_from_a_folder(tmp_path, lines, streaming, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "data.jsonl").write_bytes(lines)
    assert read(hf_name=str(tmp_path), streaming=streaming) == READ
    with pytest.raises(
        ConfigError,
        match=r"hf_name .* has no column 'txt' \(did you mean 'text'\?\); it has text, n",
    ):
        read(hf_name=str(tmp_path), streaming=streaming, text_key="txt")
    with pytest.raises(ConfigError, match=r"dataset.hf_name '.*', split 'dev', cannot be loaded: "):
        read(hf_name=str(tmp_path), split="dev", streaming=streaming)


def test_a_dataset_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": DOCUMENTS})}).save_to_disk(
        tmp_path / "saved"
    )
    assert read(hf_name=str(tmp_path / "saved"), split="test") == READ


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ConfigError,
        match=r'dataset.hf_name needs datasets, .*pip install "tokenyard-train\[datasets\]"',
    ):
        read(hf_name="x")


def test_a_description_changes_with_the_content(tmp_path, lines):
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines)
    before = describe_source(Source(path=str(file)), "dataset")
    assert describe_source(Source(path=str(file)), "dataset") == before
    file.write_bytes(lines.replace(b"one", b"eno"))
    assert describe_source(Source(path=str(file)), "dataset") != before


@pytest.mark.parametrize(
    ("keys", "has"),
    [
        ({}, "none"),
        ({"path": "a", "packed": "b"}, "path and packed"),
        ({"path": "a", "streams": {"b": {"path": "c"}}}, "path and streams"),
    ],
)
def test_a_source_has_exactly_one_location(keys, has):
    with pytest.raises(
        ConfigError,
        match=f"it has {has}; give exactly one of path, packed, local, hf_name, delta, streams",
    ):
        parse(TextDataset, keys)


def foundry_config(settings, **changes):
    """Return a config in which every blank key of LLM Foundry's data sections is written."""
    blank = {"remote": None, "split": None, "hf_kwargs": None, "packed": None, "hf_name": ""}
    loader = settings["train_loader"] | {"drop_last": True}
    loader["dataset"] = loader["dataset"] | blank | changes
    return settings | {
        "train_loader": loader,
        "tokenizer": {"name": "bytes", "kwargs": None, "eos_token": None},
    }


@pytest.mark.parametrize("blank", [None, ""])
def test_a_key_without_a_value_is_not_there(settings, text, blank):
    plain = read_config(settings).data()
    full = foundry_config(settings, remote=blank, text_key=blank, suffixes=blank, shuffle=blank)
    assert read_config(full).data() == plain
    stream = {"path": str(text), "local": blank, "remote": blank, "proportion": blank}
    full["train_loader"]["dataset"] = {"remote": blank, "streams": {"a": stream}, "path": blank}
    full["eval_loader"] = settings["eval_loader"] | {
        "dataset": settings["eval_loader"]["dataset"] | {"remote": blank, "local": blank}
    }
    streams = {"streams": {"a": {"path": str(text)}}}
    loader = {"name": "text", "dataset": streams}
    assert read_config(full).data() == read_config(settings | {"train_loader": loader}).data()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("train_loader.dataset", "train_loader.dataset.remote is a key of LLM Foundry"),
        ("eval_loader.dataset", "eval_loader.dataset.remote is a key of LLM Foundry"),
        ("train_loader.dataset.streams.a", r"dataset.streams.a.remote is a key of LLM Foundry"),
    ],
)
def test_a_remote_with_a_value_is_refused(settings, text, path, said):
    if "streams" in path:
        settings["train_loader"]["dataset"] = {"streams": {"a": {"path": str(text)}}}
    section = settings
    for key in path.split("."):
        section = section[key]
    section["remote"] = "s3://bucket/data"
    with pytest.raises(ConfigError, match=rf"{said}.*; bring the shards here"):
        read_config(settings)


@pytest.mark.parametrize("key", ["path", "local", "packed", "hf_name"])
def test_an_empty_location_is_none(key):
    with pytest.raises(ConfigError, match="it has none; give exactly one of"):
        parse(TextDataset, {key: ""})


def test_an_unknown_key_without_a_value_is_still_unknown(settings):
    with pytest.raises(ConfigError, match=r"train_loader.dataset.pth"):
        read_config(foundry_config(settings, pth=None))


def test_another_length_in_the_dataset_is_refused(settings):
    assert build_data(read_config(foundry_config(settings, max_seq_len=24)).data())
    with pytest.raises(
        ConfigError, match=r"train_loader.dataset.max_seq_len is 12, and max_seq_len is 24; give"
    ):
        build_data(read_config(foundry_config(settings, max_seq_len=12)).data())


def test_a_begin_token_is_refused():
    with pytest.raises(ConfigError, match=r"a token at the start of a document is not supported"):
        parse(TokenizerConfig, {"name": "tiktoken", "kwargs": {"add_bos_token": True}})


def test_a_description_of_shards_and_of_local_datasets_is_of_their_content(tmp_path):
    mds = tmp_path / "mds"
    shutil.copytree(Path(__file__).parent / "mds_of_streaming" / "ids-ndarray", mds)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "train.jsonl").write_text('{"text": "one"}')
    shard = mds / "shard.00000.mds"
    for source, file in (
        (Source(local=str(mds)), shard),
        (Source(hf_name=str(tmp_path / "hf")), tmp_path / "hf" / "train.jsonl"),
    ):
        before = describe_source(source, "dataset")
        assert describe_source(source, "dataset") == before
        file.write_bytes(file.read_bytes()[:-2] + b"zz")
        assert describe_source(source, "dataset") != before


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ({"path": "a", "split": "train"}, r"dataset.split is 'train', .*no effect beside path; .* "
         r"it is for local and hf_name"),
        ({"path": "a", "streaming": False}, r"dataset.streaming is False, .* is for hf_name"),
        ({"path": "a", "token_encoding_type": "int32"}, r"token_encoding_type is 'int32', which h"),
        ({"hf_name": "a", "suffixes": [".x"]}, r"dataset.suffixes is \['.x'\], .* is for path"),
        ({"hf_name": "a", "token_encoding_type": "int32"}, r"dataset.token_encoding_type is 'int3"),
        ({"packed": "a", "text_key": "b"}, r"dataset.text_key is 'b', .* path and local and hf_na"),
        ({"streams": {"x": {"path": "a"}}, "split": "b"}, r"dataset.split is 'b', .*in any stream"),
        ({"streams": {"x": {"path": "a", "split": "b"}}}, r"dataset.streams.x.split is 'b', which"),
    ],
)  # fmt: skip
def test_a_key_without_effect_is_refused(settings, dataset, said):
    loader = {"name": "text", "dataset": dataset}
    with pytest.raises(ConfigError, match=said):
        build_data(read_config(settings | {"train_loader": loader}).data())


def test_keys_beside_streams_are_their_defaults(settings, tmp_path):
    """As in LLM Foundry."""
    rows = {"a.jsonl": {"b": "b" * 40, "c": "c" * 40}, "d.jsonl": {"b": "d" * 40, "c": "e" * 40}}
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row))
    streams = {name: {"path": str(tmp_path / name)} for name in rows}
    streams["d.jsonl"]["text_key"] = "c"
    dataset = {"streams": streams, "text_key": "b"}
    loader = {"name": "text", "dataset": dataset}
    mixture = build_data(read_config(settings | {"train_loader": loader}).data()).train
    read = {name: set(s.tokens.tolist()) for name, s in mixture.streams.items()}
    assert read == {"a.jsonl": {ord("b"), 256}, "d.jsonl": {ord("e"), 256}}


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        ({"name": "bytes", "eos_token": "x"}, r"tokenizer.eos_token is 'x', .* effect with bytes;"),
        ({"kwargs": {"encoding_name": "gpt2"}}, r"tokenizer.kwargs is .*gpt2.*no effect with byte"),
    ],
)
def test_an_option_of_another_tokenizer_is_refused(settings, text, tokenizer, said):
    loader = {"name": "text", "dataset": {"path": str(text)}}
    config = settings | {"train_loader": loader}
    with pytest.raises(ConfigError, match=said):
        build_data(read_config(config | {"tokenizer": tokenizer}).data())
    kept = {"name": "bytes", "kwargs": {"model_max_length": 5}}  # ignored with a warning
    assert build_data(read_config(config | {"tokenizer": kept}).data())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--split", "x"], "--split is 'x', which has no effect on files"),
        (["--eos-token", "x"], "--eos-token is 'x', which has no effect with bytes"),
    ],
)
def test_an_option_of_data_pack_without_effect_is_refused(tokenyard, tmp_path, options, said):
    (tmp_path / "a.txt").write_text("text")
    arguments = ["data", "pack", str(tmp_path / "p"), str(tmp_path / "a.txt"), "--workers", "1"]
    code, _, errors = tokenyard(*arguments, *options)
    assert code == 2
    assert said in " ".join(errors.split())


def test_a_split_of_a_dataset_without_splits_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(str(tmp_path / "saved"))
    assert read(hf_name=str(tmp_path / "saved")) == [b"one"]
    with pytest.raises(ConfigError, match=r"dataset.split is 'test', .* without splits .*leave"):
        read(hf_name=str(tmp_path / "saved"), split="test")


def test_a_split_that_a_saved_dataset_lacks_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one"]})
    datasets.DatasetDict({"fit": rows, "test": rows}).save_to_disk(str(tmp_path / "saved"))
    assert read(hf_name=str(tmp_path / "saved"), split="fit") == [b"one"]
    for split in ({"split": "dev"}, {}):
        with pytest.raises(ConfigError, match=r"split is '(dev|train)', .*has the splits fit, tes"):
            read(hf_name=str(tmp_path / "saved"), **split)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_of_text_files_is_refused(tmp_path, streaming, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match=r"a row of each line; give the folder by path"):
        read(hf_name=str(tmp_path), streaming=streaming)
    assert read(path=str(tmp_path)) == [b"one\ntwo\n"]


@pytest.mark.parametrize("out", ["texts", "texts/packed", "."])
def test_an_output_among_the_text_is_refused(tokenyard, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.txt").write_text("text")
    source = "texts" if out == "texts/packed" else "texts/b.txt"
    code, _, errors = tokenyard("data", "pack", out, source, "--workers", "1")
    assert code == 2
    assert f"OUT is '{out}' and SOURCE '{source}', one inside" in " ".join(errors.split())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b.txt", "texts"]


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("gone", [], "error: SOURCE 'gone' does not exist; give a file of text"),
        ("empty", [], "error: SOURCE 'empty' is a folder without files that end in"),
        ("rows.jsonl", [], "error: SOURCE: rows.jsonl line 1 has no column 'text'; it has body; "
                           "see text_key (data pack: --text-key)"),
        ("gone", ["--mds"], "error: --mds SOURCE 'gone' has no index.json"),
        ("gone", ["--hf"], "error: --hf SOURCE 'gone', split 'train', cannot be loaded: "),
    ],
)  # fmt: skip
def test_data_pack_names_its_arguments(tokenyard, tmp_path, monkeypatch, source, options, said):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"body": "one"}\n')
    code, _, errors = tokenyard("data", "pack", "out", source, "--workers", "1", *options)
    assert code == 2
    assert " ".join(errors.split()).startswith(said)
