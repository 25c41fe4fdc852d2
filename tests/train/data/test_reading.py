"""One rule for odd values and damaged files in every source: read, skipped or refused by name."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest

from tokenyard import ConfigError
from tokenyard_train.data.schema import Source
from tokenyard_train.data.sources import read_documents
from tokenyard_train.data.sources import text as text_rules

BOM = b"\xef\xbb\xbf"
JSON_NAMES = ["a.jsonl", "a.ndjson", "A.JSONL", "a.jsonl.gz", "a.json.gz", "a.NDJSON.zst"]
NAMES = [*JSON_NAMES, "a.json", "a.json.zst", "a.parquet", "hf", "hf-stream"]


def pack_bytes(name: str, content: bytes) -> bytes:
    """Compress by a name's suffix."""
    if name.lower().endswith(".gz"):
        return gzip.compress(content, mtime=0)
    if name.lower().endswith(".zst"):
        return pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    return content


def write(folder: Path, name: str, values: list[object]) -> Source:
    """Write rows whose column `text` has the values; return the source that reads them."""
    if name.startswith("hf"):
        pytest.importorskip("datasets")
        (folder / "train.jsonl").write_bytes(_lines(values))
        return Source(hf_name=str(folder), streaming=name == "hf-stream")
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"n": range(len(values)), "text": values}), folder / name)
    else:
        array = name in ("a.json", "a.json.zst")
        rows = [{"n": i, "text": value} for i, value in enumerate(values)]
        content = json.dumps(rows, indent=1).encode() if array else _lines(values)
        (folder / name).write_bytes(pack_bytes(name, content))
    return Source(path=str(folder / name))


def _lines(values: list[object]) -> bytes:
    return b"".join(json.dumps({"n": 0, "text": v}).encode() + b"\n" for v in values)


def read(source: Source) -> list[bytes]:
    return list(read_documents(source, "dataset"))


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("values", "documents"),
    [
        (["one", "zwei ü\n", "✓" * 3000], ["one", "zwei ü\n", "✓" * 3000]),
        (["one", "", "two"], ["one", "two"]),
        (["one", None, "two", None], ["one", "two"]),
        (["\ufeffone", "t\ufeffwo"], ["one", "t\ufeffwo"]),
    ],
    ids=["text", "empty", "null", "mark"],
)
def test_texts_are_read(tmp_path, name, values, documents, caplog):
    assert read(write(tmp_path, name, values)) == [text.encode() for text in documents]
    nulls = values.count(None)
    assert (f"{nulls} rows have null under 'text'; skipped" in caplog.text) == bool(nulls)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (5, "a number"),
        (2.5, "a number"),
        (True, "true or false"),
        ([{"role": "user", "content": "hi"}], "a list"),
        ({"a": "b"}, "an object"),
    ],
)
def test_a_value_that_is_no_text_is_named(tmp_path, name, value, kind):
    said = rf"(line|row) 1: 'text' holds {kind}; text is a string.*; see text_key"
    with pytest.raises(ConfigError, match=said):
        read(write(tmp_path, name, [value, value]))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_nul_characters_are_refused_as_files_are(tmp_path, name):
    """UTF-16 without a byte order mark is valid UTF-8."""
    with pytest.raises(ConfigError, match=r"(line|row) 2 has 5 NUL bytes, as UTF-16 without"):
        read(write(tmp_path, name, ["a\0bcd", "h\0e\0l\0l\0o\0"]))


def test_bytes_are_text_if_they_are_utf_8(tmp_path):
    assert read(write(tmp_path, "a.parquet", ["ü".encode(), BOM + b"b"])) == ["ü".encode(), b"b"]
    with pytest.raises(ConfigError, match=r"a.parquet row 2 is not UTF-8 text"):
        read(write(tmp_path, "a.parquet", [b"a", b"\xff"]))


def test_a_lone_surrogate_is_not_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "ab\ud800"}')
    with pytest.raises(ConfigError, match=r"line 1: 'text' has a lone surrogate at character 2"):
        read(Source(path=str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("name", [*NAMES, "a.txt.gz", "a.txt.zst"])
def test_a_file_cut_anywhere_is_refused_or_lacks_whole_rows(tmp_path, name):
    """No cut is read as if it were the whole, except between two lines of an uncompressed file."""
    if ".txt" in name:
        (tmp_path / name).write_bytes(pack_bytes(name, b"some text " * 500))
        source, whole = Source(path=str(tmp_path / name)), []
    else:
        whole = [f"text {i} of many" for i in range(40)]
        source = write(tmp_path, name, whole)
    path = next(path for path in tmp_path.iterdir())
    content = path.read_bytes()
    plain = "hf" in name or name.lower() in ("a.jsonl", "a.ndjson", "a.json")
    for size in range(0, len(content), 1 + len(content) // (6 if "hf" in name else 50)):
        path.write_bytes(content[:size])
        if plain and (not size or (b"\n" in content[size - 1 : size + 1] and name != "a.json")):
            continue
        with pytest.raises(ConfigError, match=rf"({path.name}|hf_name) |cannot be (read|loaded)"):
            read(source)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.json.zst"])
def test_a_flipped_bit_is_an_error_in_one_sentence_or_changes_no_text(tmp_path, name):
    texts = [f"text {i} é" for i in range(50)]
    source = write(tmp_path, name, texts)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    refused = 0
    for position in range(0, len(content), 1 + len(content) // 60):
        content[position] ^= 4
        path.write_bytes(content)
        refused += _refusal(source, name)
        content[position] ^= 4
    assert refused


def _refusal(source: Source, name: str) -> bool:
    """Return whether reading is refused; it must be in one sentence that has the name."""
    try:
        read(source)
    except ConfigError as error:
        said = str(error)
    else:
        return False
    assert name in said
    assert "\n" not in said
    return True


def test_all_frames_of_a_compressed_file_are_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    for name, compress in (
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress),
    ):
        frames = [compress(_lines([f"{i} " * 9000])) for i in range(5)]
        (tmp_path / name).write_bytes(b"".join(frames))
        assert len(read(Source(path=str(tmp_path / name)))) == 5


def test_an_uncompressed_file_that_is_named_compressed(tmp_path):
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(_lines(["one"]))
        with pytest.raises(ConfigError, match=rf"{name} cannot be read: "):
            read(Source(path=str(tmp_path / name)))


@pytest.mark.parametrize("name", ["a.txt", "README", "a.md.gz", "a.rs", "A.TXT"])
def test_text_files(tmp_path, name):
    (tmp_path / name).write_bytes(pack_bytes(name, BOM + "héllo".encode()))
    assert read(Source(path=str(tmp_path / name))) == ["héllo".encode()]
    (tmp_path / name).write_bytes(pack_bytes(name, "héllo".encode("utf-16")))
    with pytest.raises(ConfigError, match=rf"{name} is UTF-16 text; convert it to UTF-8"):
        read(Source(path=str(tmp_path / name)))
    (tmp_path / name).write_bytes(pack_bytes(name, b"h\xe9llo"))
    with pytest.raises(ConfigError, match=rf"{name} is not UTF-8 text; convert it, or leave"):
        read(Source(path=str(tmp_path / name)))
    (tmp_path / name).write_bytes(pack_bytes(name, "hello".encode("utf-16-le")))
    with pytest.raises(ConfigError, match=rf"{name} has 5 NUL bytes, as UTF-16 without"):
        read(Source(path=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.csv", r"a.csv is a table \(CSV\), which is not read; convert it to .jsonl or"),
        ("a.TSV.gz", r"is a table \(TSV\)"),
        ("a.arrow", r"is a table \(Arrow\)"),
        ("a.pdf", r"a.pdf ends in '.pdf', which is not read; text .*rename it, or list it in"),
        ("a.jsonl.bz2", r"ends in '.bz2', which is not read"),
        ("a.jsonl.old", r"ends in '.old', which is not read"),
        ("a.tar.gz", r"ends in '.tar', which is not read"),
        ("a.parquet.gz", r"is a compressed parquet file; decompress it"),
    ],
)
def test_an_unknown_suffix_is_refused(tmp_path, name, said):
    (tmp_path / name).write_bytes(pack_bytes(name, b"text\none\n"))
    with pytest.raises(ConfigError, match=said):
        read(Source(path=str(tmp_path / name)))


def test_a_listed_suffix_is_text(tmp_path):
    (tmp_path / "a.mine").write_text("one")
    (tmp_path / "b.MINE").write_text("two")
    (tmp_path / "c.csv").write_text("text")
    assert read(Source(path=str(tmp_path), suffixes=[".mine"])) == [b"one", b"two"]
    with pytest.raises(ConfigError, match=r"c.csv is a table"):
        read(Source(path=str(tmp_path), suffixes=[".mine", ".csv"]))


@pytest.mark.parametrize("content", ['{"text": "one"}\n', '[\n {"text": "one"}]', '[{"a":1}]'])
def test_rows_that_are_named_text_are_refused(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ConfigError, match=r"a.txt holds rows of JSON, and its name says text"):
        read(Source(path=str(tmp_path / "a.txt")))
    (tmp_path / "a.txt").write_text("[1] is a reference, {x} a set")
    assert len(read(Source(path=str(tmp_path / "a.txt")))) == 1


def test_every_spelling_is_found_in_a_folder_and_what_is_left_out_is_named(tmp_path, caplog):
    for name in JSON_NAMES:
        write(tmp_path, name, [name])
    (tmp_path / "left.csv").touch()
    (tmp_path / "left.json").touch()
    assert sorted(read(Source(path=str(tmp_path)))) == sorted(name.encode() for name in JSON_NAMES)
    assert "2 files are left out, by suffix: .csv (1), .json (1); see" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n{"text": ', r"a.json line 2 is not JSON: "),
        (b'{"txet": "a"}', r"line 1 has no column 'text' \(did you mean 'txet'\?\); it has txet;"),
        (b"5", r"line 1 has no column 'text'; it has no columns"),
        (b'["text"]', r"a.json row 1 has no column 'text'; it has no columns"),
        (b'[{"text": "a"} {"text": "b"}]', r"has '\{' where , or \] must follow"),
        (b'[{"text": "a"}', r"a.json is cut off: its array has no end"),
        (b'[{"text": "a"}] x', r"a.json has 'x' after its array"),
        (b'[{"text": "a"},]', r"a.json row 2 is not JSON: "),
        (b'{"text": "a"}\n' + b"[" * 200_000, r"a.json line 2 is not JSON: it is nested too deep"),
        (b"[" * 200_000, r"a.json row 1 is not JSON: it is nested too deep"),
        (b'{"text": "\xff"}', r"a.json line 1 is not JSON: 'utf-8' codec"),
        (b'{"text": "a", "text": "b"}', r"line 1 is not JSON: it has the key 'text' twice"),
        (
            b'{\n "text": "a"\n}',
            r"a.json has a row of JSON over several lines; write each row in one line",
        ),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", r"a number of more than 4,300 digits"),
        (b'[{"n": ' + b"9" * 5000 + b"}]", r"row 1 is not JSON: it has a number of more than 4,"),
    ],
)
def test_json_that_is_malformed_is_named(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read(Source(path=str(tmp_path / "a.json")))


def test_a_key_that_stands_twice_with_one_value_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "a", "text": "a"}')
    assert read(Source(path=str(tmp_path / "a.json"))) == [b"a"]


def test_parquet_with_two_columns_of_the_name_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    table = pyarrow.Table.from_arrays(columns, names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a.parquet has 2 columns 'text'; rename one"):
        read(Source(path=str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("kind", ["dictionary", "large_string", "string_view"])
def test_every_type_of_strings_in_parquet_is_text(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array(["a", "ü", None, "a"])
    if kind == "dictionary":
        column = column.dictionary_encode()
    else:
        column = column.cast(getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(Source(path=str(tmp_path / "a.parquet"))) == [b"a", "ü".encode(), b"a"]


def test_files_that_are_read_twice_are_named(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("a.txt")
    assert read(Source(path=str(tmp_path))) == [b"a", b"a"]
    assert "files read twice, as links or by several paths: 1, such as" in caplog.text
    caplog.clear()
    (tmp_path / "b.txt").unlink()
    paths = [str(tmp_path), str(tmp_path / "a.txt")]
    assert read(Source(path=paths)) == [b"a", b"a"]
    assert "files read twice" in caplog.text
    caplog.clear()
    assert read(Source(path=paths[1])) == [b"a"]
    assert not caplog.records


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_files_without_rows_are_named(tmp_path, name, caplog):
    write(tmp_path, name, [])
    (tmp_path / "b.jsonl").write_bytes(_lines(["b"]))
    assert read(Source(path=[str(tmp_path / name), str(tmp_path / "b.jsonl")])) == [b"b"]
    assert f"files without rows: 1, such as {tmp_path / name}" in caplog.text


def test_an_array_is_read_like_json_loads(tmp_path):
    values = [["a" * n, 'x, ] [ " \\ ü'] for n in (0, 10, 3_000_000)]
    rows = [{"text": text, "more": [1, {"b": None}]} for pair in values for text in pair]
    for indent in (None, 1):
        (tmp_path / "a.json").write_bytes(BOM + json.dumps(rows, indent=indent).encode())
        expected = [row["text"].encode() for row in rows if row["text"]]
        assert read(Source(path=str(tmp_path / "a.json"))) == expected
    (tmp_path / "a.json").write_text(" [ ] ")
    assert read(Source(path=str(tmp_path / "a.json"))) == []


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.zst", "a.json", "a.parquet"]
)
def test_a_document_beyond_the_bound_is_refused(tmp_path, name, monkeypatch):
    for module in ("text", "formats"):
        monkeypatch.setattr(f"tokenyard_train.data.sources.{module}.MAX_DOCUMENT_BYTES", 1 << 21)
    document = "x" * (5 << 20)
    if ".txt" in name:
        (tmp_path / name).write_bytes(pack_bytes(name, document.encode()))
        source = Source(path=str(tmp_path / name))
    else:
        source = write(tmp_path, name, [document])
    with pytest.raises(ConfigError, match=r"more than 2,097,152 bytes"):
        read(source)


def test_the_bound_is_stated():
    readme = Path(__file__).parents[3] / "packages" / "train" / "README.md"
    assert f"{text_rules.MAX_DOCUMENT_BYTES >> 20} MiB" in readme.read_text()


def refuse(monkeypatch, name: str, denied: Path) -> None:
    """Let a function of `os` refuse a path, as it does for a user who may not read it."""
    real = getattr(os, name)

    def function(path, *args, **kwargs):
        if not isinstance(path, int) and Path(path) == denied:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, name, function)


def test_what_cannot_be_reached_in_a_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "x" / "b.txt").write_text("b")
    with monkeypatch.context() as context:
        refuse(context, "scandir", tmp_path / "x")
        with pytest.raises(ConfigError, match=r"path: .*/x cannot be listed: Permission denied"):
            read(Source(path=str(tmp_path)))
    (tmp_path / "x" / "c.txt").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"path: .*c.txt is a link to nothing; repair it"):
        read(Source(path=str(tmp_path)))
    (tmp_path / "x" / "c.txt").unlink()
    os.mkfifo(tmp_path / "x" / "d.txt")
    with pytest.raises(ConfigError, match=r"d.txt is no plain file; leave it out"):
        read(Source(path=str(tmp_path)))


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "data" / "x").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a")
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    (tmp_path / "data" / "x" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "y").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "z").symlink_to(tmp_path / "elsewhere")
    assert read(Source(path=str(tmp_path / "data"))) == [b"a", b"b"]


@pytest.mark.parametrize("path", ["a" * 400, "a\0b", "gone.txt"])
def test_a_path_that_leads_nowhere_is_one_sentence(path):
    with pytest.raises(ConfigError, match=r"dataset.path '(a|gone).*(cannot be read|does not ex)"):
        read(Source(path=path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.jsonl.gz", "a.jsonl.zst"])
def test_an_unreadable_file_is_one_sentence(tmp_path, name, monkeypatch):
    (tmp_path / name).write_bytes(b"some")
    real = Path.open

    def denied(path, *args, **kwargs):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    if name.endswith((".gz", ".parquet")) and os.geteuid() == 0:
        pytest.skip("opened by the library, and root may read every file")
    with pytest.raises(ConfigError, match=rf"{re.escape(name)} cannot be read: Permission denied"):
        read(Source(path=str(tmp_path / name)))


def test_source_code_may_hold_a_nul_byte(tmp_path):
    (tmp_path / "a.py").write_bytes(b"x = '\x00' + str(1)")
    assert read(Source(path=str(tmp_path / "a.py"))) == [b"x = '\x00' + str(1)"]


@pytest.mark.parametrize("meta", ['{"a": 1, "a": 2}', "1", "NaN"])
@pytest.mark.parametrize("array", [False, True])
def test_keys_that_are_not_the_text_may_be_doubled(tmp_path, meta, array):
    row = f'{{"text": "hi", "meta": {meta}, "meta": {meta}}}'
    path = tmp_path / ("a.json" if array else "a.jsonl")
    path.write_text(f"[{row}]" if array else row)
    assert read(Source(path=str(path))) == [b"hi"]
