"""Read a version of a Delta table as deltalake and the protocol define its rows."""

import json
import sys

import pytest

from tokenyard import ConfigError
from tokenyard_models.strict_config import parse
from tokenyard_train.data import TokenFile, build_tokenizer
from tokenyard_train.data.finetuning.build import build_packed
from tokenyard_train.data.schema import FinetuningDataset, Source, TextDataset
from tokenyard_train.data.sources import describe_source, read_documents
from tokenyard_train.data.sources.rows import read_rows

from .delta_tables import added, commit, field, metadata, protocol

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed")

TEXTS = ["one, naïve", "two\nlines", None, "", "four ✓"]


def write(folder, texts, **options):
    content = pyarrow.table({"text": texts, "n": list(range(len(texts)))})
    deltalake.write_deltalake(str(folder), content, **options)


def read(folder, **source):
    documents = read_documents(Source(delta=str(folder), **source), "dataset")
    return [document.decode() for document in documents]


def test_each_version_has_its_own_rows(tmp_path, caplog):
    write(tmp_path, TEXTS)
    write(tmp_path, ["five"], mode="append")
    write(tmp_path, ["other"], mode="overwrite")
    first = [text for text in TEXTS if text]
    assert read(tmp_path, version=0) == first
    assert sorted(read(tmp_path, version=1)) == sorted([*first, "five"])
    assert read(tmp_path, version=2) == read(tmp_path) == ["other"]
    assert "dataset: 1 rows have null under 'text'; skipped" in caplog.text


def test_rows_are_those_of_the_library_after_updates_and_deletions(tmp_path):
    """Partitions with characters that paths escape, a deletion, and a column that was added."""
    languages = ["e n/é=", "de", None, "de"] * 50
    content = {"text": [f"text {i}" for i in range(200)], "lang": languages}
    options = {"partition_by": ["lang"]}
    deltalake.write_deltalake(str(tmp_path), pyarrow.table(content), **options)
    wide = pyarrow.table({"text": ["wide"], "lang": ["de"], "more": ["new"]})
    deltalake.write_deltalake(str(tmp_path), wide, mode="append", schema_mode="merge", **options)
    table = deltalake.DeltaTable(str(tmp_path))
    table.delete("text = 'text 5'")
    rows = [row for _, row in read_rows(FinetuningDataset(delta=str(tmp_path)), "dataset")]
    expected = pyarrow.table(table.scan()).to_pylist()
    assert len(rows) == 200
    assert sorted(map(str, rows)) == sorted(map(str, expected))
    assert sorted(read(tmp_path, text_key="more")) == ["new"]
    assert sorted(set(read(tmp_path, text_key="lang"))) == ["de", "e n/é="]
    assert read(tmp_path) == read(tmp_path)


def hard_table(folder):
    """Write a table with a deletion vector and other names in its files; return its columns."""
    values = {
        "col-1": [f"row {i}" for i in range(150)],
        "col-2": [[{"col-4": "user", "col-5": f"say {i}"}] for i in range(150)],
    }
    (folder / "lang=a%20b").mkdir(parents=True)
    parquet.write_table(pyarrow.table(values), folder / "lang=a%20b" / "x.parquet")
    role = field("role", stored="col-4", number=4)
    content = field("content", stored="col-5", number=5)
    message = {"type": "struct", "fields": [role, content]}
    messages = {"type": "array", "elementType": message, "containsNull": True}
    fields = [
        field("text", stored="col-1", number=1),
        field("messages", messages, stored="col-2", number=2),
        field("lang", stored="col-3", number=3),
    ]
    names = {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "5"}
    deleted = [0, 70, 149]
    file = added(folder, "lang=a%20b/x.parquet", 150, deleted, {"col-3": "a b"})
    features = protocol("columnMapping", "deletionVectors")
    commit(folder, 0, features, metadata(fields, ["lang"], **names), file)
    return [i for i in range(150) if i not in deleted]


def test_deletion_vectors_and_column_mapping(tmp_path):
    kept = hard_table(tmp_path)
    assert read(tmp_path) == [f"row {i}" for i in kept]
    assert read(tmp_path, text_key="lang") == ["a b"] * len(kept)
    located = list(read_rows(FinetuningDataset(delta=str(tmp_path)), "dataset"))
    assert [row for _, row in located] == [
        {
            "text": f"row {i}",
            "messages": [{"role": "user", "content": f"say {i}"}],
            "lang": "a b",
        }
        for i in kept
    ]
    assert located[0][0].endswith("version 0 lang=a%20b/x.parquet row 2")
    assert [row for _, row in located] == pyarrow.table(
        deltalake.DeltaTable(str(tmp_path)).scan()
    ).to_pylist()


def test_features_that_are_not_read_are_named(tmp_path):
    commit(tmp_path / "a", 0, protocol("variantType"), metadata([field("text")]))
    with pytest.raises(ConfigError, match=r"needs the feature variantType of Delta, which is not"):
        read(tmp_path / "a")
    ids = {"delta.columnMapping.mode": "id", "delta.columnMapping.maxColumnId": "1"}
    mapped = metadata([field("text", stored="c")], **ids)
    commit(tmp_path / "b", 0, protocol("columnMapping"), mapped)
    with pytest.raises(ConfigError, match=r"has delta.columnMapping.mode 'id', which is not"):
        read(tmp_path / "b")


@pytest.mark.parametrize("name", ["a b", "a#b?c", "é✓"])
def test_a_folder_of_another_name_holds_a_table(tmp_path, name):
    write(tmp_path / "table", TEXTS)
    (tmp_path / "table").rename(tmp_path / name)
    located = parse(TextDataset, {"delta": (tmp_path / name).as_uri()}).delta
    assert read(tmp_path / name) == read(located) == [text for text in TEXTS if text]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"delta": "a.b.c"}, "holds a _delta_log, or uc://a.b.c for Unity Catalog"),
        ({"delta": "none"}, r"dataset.delta '.*none' is no Delta table; give a folder that holds"),
        ({"version": 7}, r"dataset.version is 7, and the newest version of '.*' is 1; give"),
        ({"text_key": "txt"}, r"has no column 'txt' \(did you mean 'text'\?\); it has text, n;"),
        ({"text_key": "n"}, r"version 1 part-\S+ row 1: 'n' holds a number; text is a string"),
    ],
)
def test_errors_are_one_sentence(tmp_path, monkeypatch, source, sentence):
    write(tmp_path / "table", TEXTS)
    write(tmp_path / "table", TEXTS, mode="append")
    monkeypatch.chdir(tmp_path)
    location = source.pop("delta", "table")
    with pytest.raises(ConfigError, match=sentence) as caught:
        read(location, **source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["table", "."])
def test_the_files_of_a_table_are_not_read_as_files(tmp_path, folder):
    write(tmp_path / "table", TEXTS)
    write(tmp_path / "table", ["new"], mode="overwrite")
    source = Source(path=[str(tmp_path / folder)])
    with pytest.raises(ConfigError, match=r"holds the Delta table .*table, .* as dataset.delta"):
        list(read_documents(source, "dataset"))


def test_files_that_are_gone_or_damaged_are_named(tmp_path):
    write(tmp_path, TEXTS)
    write(tmp_path, ["new"], mode="overwrite")
    (old,) = (path for path in tmp_path.glob("*.parquet") if "one" in str(parquet.read_table(path)))
    old.write_bytes(old.read_bytes()[:100])
    with pytest.raises(ConfigError, match=rf"version 0: {old.name} cannot be read: "):
        read(tmp_path, version=0)
    old.unlink()
    with pytest.raises(ConfigError, match=rf"{old.name} is gone, perhaps deleted by VACUUM"):
        read(tmp_path, version=0)
    log = tmp_path / "_delta_log" / f"{0:020}.json"
    log.write_text("{nonsense")
    with pytest.raises(ConfigError, match="cannot be opened: Json error: ") as caught:
        read(tmp_path, version=0)
    assert "<unknown>" not in str(caught.value)
    log.unlink()
    with pytest.raises(ConfigError, match=r"is 0, which '.*' no longer holds|cannot be opened"):
        read(tmp_path, version=0)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"delta": "dbfs:/x"},
            "'dbfs:/x': give a local folder, such as /dbfs/tables/articles, uc:",
        ),
        ({"delta": "uc:/a.b.c"}, "'uc:/a.b.c': give a local folder, .* uc://catalog.schema.table"),
        ({"delta": "az://c/x?sv=1&sig=secret"}, r"'az://c/x\?\*\*\*': it holds a query"),
        ({"delta": "file://host/x"}, "it names a host; give file:///folder, or the path alone"),
        ({"delta": "s3://key:secret@bucket/x"}, r"'s3://key:\*\*\*@bucket/x'.*holds a password"),
        ({"delta": "x", "version": -1}, "version is -1"),
        ({"delta": "x", "path": "y"}, "it has path and delta; give exactly one"),
    ],
)
def test_sections_are_validated(keys, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse(TextDataset, keys)
    assert parse(TextDataset, {"delta": "abfss://c@account.dfs.core.windows.net/x"}).delta


def test_the_library_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(
        ConfigError,
        match=r'dataset.delta needs deltalake, .*pip install "tokenyard-train\[delta\]"',
    ):
        read("x")


def test_a_description_names_the_version_and_its_rows(tmp_path):
    def described(version):
        return describe_source(Source(delta=str(tmp_path), version=version), "dataset")

    write(tmp_path, TEXTS)
    before = described(0)
    assert before[0] == {"delta": str(tmp_path), "version": 0}
    write(tmp_path, TEXTS, mode="append")
    assert described(0) == before
    assert described(1)[1]["sha256"] != before[1]["sha256"]


def test_an_interrupted_pack_goes_on_with_its_version(tmp_path, tokenyard, monkeypatch):
    """The table is overwritten while `data pack` is interrupted."""
    table = tmp_path / "table"
    write(table, TEXTS)
    monkeypatch.setattr("tokenyard_train.data.packing.CHUNK_BYTES", 8)
    arguments = ("--delta", "--workers", "1", str(table))
    expected = tmp_path / "expected"
    assert tokenyard("data", "pack", str(expected), *arguments)[0] == 0
    out = tmp_path / "out"

    def stop(*_):
        raise ConfigError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr("tokenyard_train.data.packing.finish_packing", stop)
        assert tokenyard("data", "pack", str(out), *arguments)[0] == 2
    write(table, ["changed"], mode="overwrite")
    assert tokenyard("data", "pack", str(out), *arguments)[0] == 0
    assert TokenFile(out).identity() == TokenFile(expected).identity()
    assert TokenFile(out).manifest["sources"][0] == {"delta": str(table), "version": 0}
    assert tokenyard("data", "pack", str(out), *arguments, "--overwrite")[0] == 0
    assert TokenFile(out).manifest["sources"][0]["version"] == 1


def test_options_of_pack_have_an_effect_or_are_refused(tmp_path, tokenyard):
    (tmp_path / "a.txt").write_text("text")
    out, file = str(tmp_path / "out"), str(tmp_path / "a.txt")
    for options, sentence in (
        (["uc://a.b.c"], "SOURCE 'uc://a.b.c' is a table of Unity Catalog; add --delta"),
        (["--table-version", "1"], "--table-version is 1, which has no effect on files"),
        (["--mds", "--delta"], "--mds and --delta were given"),
        (["--delta", "--split", "x"], "--split is 'x', which has no effect on a source of --delta"),
    ):
        code, _, stderr = tokenyard("data", "pack", out, file, *options)
        assert code == 2
        assert sentence in " ".join(stderr.split())


def test_conversations_are_read_from_a_table(tmp_path, config):
    pytest.importorskip("jinja2")
    rows = [{"prompt": f"{i} and", "response": f" {i + 1}"} for i in range(8)]
    deltalake.write_deltalake(str(tmp_path / "t"), pyarrow.Table.from_pylist(rows))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config().data()
    tokenizer = config().tokenizer

    def packed(**location):
        dataset = FinetuningDataset(**location)
        return build_packed(dataset, settings, build_tokenizer(tokenizer), "dataset").identity()

    assert packed(delta=str(tmp_path / "t")) == packed(path=str(tmp_path / "rows.jsonl"))
