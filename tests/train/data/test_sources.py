"""Read documents from files and datasets in a fixed order, with one-sentence errors."""

import gzip
import json
import sys

import pytest

from tokenyard import ConfigError
from tokenyard_models.strict_config import parse
from tokenyard_train.data.schema import Source, TextDataset
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
        match=f"it has {has}; give exactly one of path, packed, local, hf_name, streams",
    ):
        parse(TextDataset, keys)
