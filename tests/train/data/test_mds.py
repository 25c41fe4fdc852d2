"""Read MDS shards as text or as token ids. The shards are written from the published format."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tokenyard import ConfigError
from tokenyard_train.data import CorruptError, build_data
from tokenyard_train.data.schema import Source
from tokenyard_train.data.sources import read_documents
from tokenyard_train.data.sources.mds import MdsTokens

STREAMING = Path(__file__).parent / "mds_of_streaming"
TEXTS = ["one", "zwei — ü", "", "four\nlines"]


def write(folder: Path, shards, names, encodings, sizes, compress=None) -> Path:
    """Write shards and their index. A shard is a list of samples, a sample the bytes per column."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, samples in enumerate(shards):
        columns = {"column_names": names, "column_encodings": encodings, "column_sizes": sizes}
        header = json.dumps(columns).encode()
        bodies = []
        for sample in samples:
            lengths = [len(part) for part, size in zip(sample, sizes) if size is None]
            bodies.append(np.array(lengths, dtype="<u4").tobytes() + b"".join(sample))
        first = 4 + 4 * (len(samples) + 1) + len(header)
        offsets = first + np.cumsum([0, *map(len, bodies)])
        raw = (
            np.uint32(len(samples)).tobytes()
            + offsets.astype("<u4").tobytes()
            + header
            + b"".join(bodies)
        )
        name = f"shard.{number:05}.mds"
        entry = {
            **columns,
            "format": "mds", "version": 2, "samples": len(samples), "size_limit": 1 << 26,
            "raw_data": {"basename": name, "bytes": len(raw), "hashes": {}}, "zip_data": None,
            "hashes": [], "compression": None,
        }  # fmt: skip
        if compress is None:
            (folder / name).write_bytes(raw)
        else:
            packed = compress(raw)
            (folder / f"{name}.zstd").write_bytes(packed)
            hashes = {"sha1": hashlib.sha1(packed).hexdigest(), "unknown": "not computable here"}
            zipped = {"basename": f"{name}.zstd", "bytes": len(packed), "hashes": hashes}
            entry |= {"compression": "zstd:7", "zip_data": zipped}
        entries.append(entry)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return folder


def text_shards(folder: Path, **kwargs) -> Path:
    samples = [[np.int64(i).tobytes(), text.encode()] for i, text in enumerate(TEXTS)]
    return write(
        folder, [samples[:3], samples[3:]], ["id", "text"], ["int", "str"], [8, None], **kwargs
    )


def read(folder: Path, **more: object) -> list[bytes]:
    return list(read_documents(Source(local=str(folder), **more), "dataset"))


def test_texts_are_read_in_order(tmp_path):
    text_shards(tmp_path / "data" / "train")
    assert read(tmp_path / "data", split="train") == [text.encode() for text in TEXTS if text]


def test_compressed_shards_are_unpacked_once_beside_themselves(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    folder = text_shards(
        tmp_path, compress=zstandard.ZstdCompressor(write_content_size=False).compress
    )
    assert read(folder) == read(folder) == [text.encode() for text in TEXTS if text]
    assert sorted(path.name for path in folder.glob("*.mds*")) == [
        "shard.00000.mds", "shard.00000.mds.zstd", "shard.00001.mds", "shard.00001.mds.zstd",
    ]  # fmt: skip


def test_a_compressed_shard_that_was_changed_is_refused(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    folder = text_shards(tmp_path, compress=zstandard.ZstdCompressor().compress)
    shard = folder / "shard.00001.mds.zstd"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(
        CorruptError, match=r"shard.00001.mds.zstd does not have the sha1 of its index"
    ):
        read(folder)
    assert not (folder / "shard.00001.mds").exists()


@pytest.mark.parametrize("encoding", ["bytes", "ndarray:uint16:5", "ndarray:int32:5"])
def test_any_slice_of_ids_reads_one_stream(tmp_path, encoding):
    ids = np.arange(60).reshape(12, 5)
    dtype = np.dtype("int64" if encoding == "bytes" else encoding.split(":")[1])
    size = None if encoding == "bytes" else 5 * dtype.itemsize
    samples = [[row.astype(dtype).tobytes()] for row in ids]
    write(tmp_path, [samples[:5], samples[5:6], samples[6:]], ["tokens"], [encoding], [size])
    tokens = MdsTokens(tmp_path, 257, "local")
    assert len(tokens) == 60
    assert tokens[:].dtype == np.uint16
    for start in range(0, 61, 7):
        for stop in (start, start + 1, start + 13, 60):
            assert tokens[start:stop].tolist() == list(range(60))[start:stop]


def test_training_on_shards_of_ids_and_of_text(tmp_path, config):
    samples = [[np.full(24, i, dtype=np.int64).tobytes()] for i in range(50)]
    write(tmp_path / "ids", [samples], ["tokens"], ["bytes"], [None])
    text_shards(tmp_path / "text")
    streams = {
        "ids": {"local": str(tmp_path / "ids")},
        "ids again": {"local": str(tmp_path / "ids")},
    }
    mixture = build_data(
        config(train_loader={"name": "text", "dataset": {"streams": streams}}).data()
    ).train
    assert mixture.batch(0, 4).max() < 50
    data = build_data(
        config(train_loader={"name": "text", "dataset": {"local": str(tmp_path / "text")}}).data()
    )
    assert len(data.train.tokens) == sum(len(text.encode()) + 1 for text in TEXTS if text)


def test_nothing_is_unpickled(tmp_path):
    write(tmp_path, [[[b"cos\nsystem\n(S'false'\ntR."]]], ["text"], ["pkl"], [None])
    with pytest.raises(ConfigError, match=r"column 'text' of .* is pkl; text is str or bytes"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda f: (f / "index.json").unlink(),
            r"dataset.local '.*' has no index.json; give a folder of MDS shards",
        ),
        (
            lambda f: (f / "index.json").write_text("{}"),
            r"index.json is not an index of MDS shards: version: Field required",
        ),
        (
            lambda f: (f / "shard.00000.mds").unlink(),
            r"shard.00000.mds is missing or empty; copy it again",
        ),
        (
            lambda f: (f / "shard.00000.mds").write_bytes(b"123"),
            r"has 3 bytes, and its index says \d+",
        ),
    ],
)
def test_a_broken_folder_is_one_sentence(tmp_path, change, said):
    text_shards(tmp_path)
    change(tmp_path)
    with pytest.raises((ConfigError, CorruptError), match=said):
        read(tmp_path)


def test_a_shard_outside_the_folder_is_refused(tmp_path):
    text_shards(tmp_path)
    index = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(index.replace("shard.00000.mds", "../shard.00000.mds"))
    with pytest.raises(ConfigError, match=r"a shard outside the folder: \.\./shard.00000.mds"):
        read(tmp_path)


def test_a_column_that_is_not_there(tmp_path):
    text_shards(tmp_path)
    with pytest.raises(
        ConfigError, match=r"has no column 'txt' \(did you mean 'text'\?\); it has id, text"
    ):
        read(tmp_path, text_key="txt")


@pytest.mark.parametrize("names", [["tokens"], ["id", "tokens"], ["tokens", "id"]])
@pytest.mark.parametrize("cut", [2, 40])
def test_samples_of_several_lengths_are_refused(tmp_path, names, cut):
    """In whatever column and shard, even where the first samples are equal."""
    samples = []
    for i, length in enumerate([64] + [100, 60, 140] * 20):
        columns = {"tokens": np.arange(length, dtype="<i8").tobytes(), "id": f"doc{i}".encode()}
        samples.append([columns[name] for name in names])
    encodings = {"tokens": "bytes", "id": "str"}
    shards = [samples[:1], samples[1:]] if cut == 2 else [samples[:cut], samples[cut:]]
    write(tmp_path, shards, names, [encodings[name] for name in names], [None] * len(names))
    with pytest.raises(
        ConfigError, match=r"holds samples of several lengths \(\d+ and \d+ ids\); pack the text"
    ):
        MdsTokens(tmp_path, 60000, "local")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "int32", "int64"])
def test_the_type_of_bytes_is_obeyed(tmp_path, dtype, config):
    ids = np.arange(128).reshape(8, 16).astype(dtype)
    folder = write(tmp_path, [[[row.tobytes()] for row in ids]], ["tokens"], ["bytes"], [None])
    tokens = MdsTokens(folder, 257, "local", dtype)
    assert tokens[:].tolist() == list(range(128))
    dataset = {"local": str(folder), "token_encoding_type": dtype}
    data = build_data(config(train_loader={"name": "text", "dataset": dataset}).data())
    assert data.train.tokens[:].tolist() == list(range(128))
    if dtype == "int64":
        return
    with pytest.raises((ConfigError, CorruptError), match=r"see token_enc|or its token_encoding_t"):
        MdsTokens(folder, 257, "local")


@pytest.mark.parametrize("bad", [257, 70_000, -1, -100, 1 << 33])
@pytest.mark.parametrize("shard", [0, 1])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, bad, shard):
    ids = np.arange(128).reshape(8, 16)
    ids[4 * shard + 2, 3] = bad
    samples = [[row.astype("<i8").tobytes()] for row in ids]
    folder = write(tmp_path, [samples[:4], samples[4:]], ["tokens"], ["bytes"], [None])
    with pytest.raises(
        ConfigError,
        match=rf"sample 2 of .*shard.0000{shard}.mds holds id {bad}, and the tokenizer has 257 ids",
    ):
        MdsTokens(folder, 257, "local")[64:80]


def test_shards_of_several_dtypes(tmp_path):
    """Each shard has the dtype that the index gives for it."""
    wide = write(tmp_path / "w", [[[np.arange(4, dtype="<i8").tobytes()]]], ["tokens"],
                 ["ndarray:int64:4"], [32])  # fmt: skip
    narrow = write(tmp_path / "n", [[[np.arange(4, dtype="<u2").tobytes()]]], ["tokens"],
                   ["ndarray:uint16:4"], [8])  # fmt: skip
    entries = []
    for folder in (wide, narrow):
        index = json.loads((folder / "index.json").read_text())
        index["shards"][0]["raw_data"]["basename"] = f"{folder.name}/shard.00000.mds"
        entries += index["shards"]
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    assert MdsTokens(tmp_path, 257, "local")[:].tolist() == [0, 1, 2, 3] * 2


def test_every_flipped_bit_is_found_or_changes_no_text(tmp_path):
    """Whatever the position, the texts are right, or the error is one sentence."""
    rng = np.random.default_rng(0)
    folder = text_shards(tmp_path)
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shards"]:
        raw = (folder / entry["raw_data"]["basename"]).read_bytes()
        entry["raw_data"]["hashes"] = {"sha1": hashlib.sha1(raw).hexdigest()}
    (folder / "index.json").write_text(json.dumps(index))
    expected = read(folder)
    for path in folder.iterdir():
        sound = path.read_bytes()
        for position in rng.integers(0, len(sound), 150).tolist():
            changed = bytearray(sound)
            changed[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            assert _refused(folder) or read(folder) == expected
        path.write_bytes(sound)


@pytest.mark.parametrize("column", ["tokens", "text"])
def test_a_damaged_shard_without_hashes_is_one_sentence(tmp_path, column):
    rng = np.random.default_rng(1)
    samples = [[b"%05d" % i, b"%08d" % i] for i in range(20)]
    folder = write(tmp_path, [samples], ["id", column], ["str", "bytes"], [None, None])
    path = folder / "shard.00000.mds"
    sound = path.read_bytes()
    for position in rng.integers(0, len(sound), 200).tolist():
        changed = bytearray(sound)
        changed[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        _refused(folder, column)  # raises any other error
    for size in range(0, len(sound), 20):
        path.write_bytes(sound[:size])
        assert _refused(folder, column)


def _refused(folder, column="text") -> bool:
    try:
        if column == "tokens":
            MdsTokens(folder, 1 << 20, "local", "uint8")[:]
        else:
            read(folder)
    except (ConfigError, CorruptError) as error:
        return "\n" not in str(error) or pytest.fail(str(error))
    return False


def test_text_that_is_not_utf_8_is_refused(tmp_path):
    for encoding in ("str", "bytes"):
        write(tmp_path, [[[b"a"], [b"\xff"]]], ["text"], [encoding], [None])
        with pytest.raises(ConfigError, match=r"shard.00000.mds row 2 is not UTF-8 text"):
            read(tmp_path)
    write(tmp_path, [[[b"\xef\xbb\xbfone"], [b""]]], ["text"], ["str"], [None])
    assert read(tmp_path) == [b"one"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": -1}, r"shards.0.samples: Input should be greater than or equal to 0"),
        ({"samples": "3"}, r"shards.0.samples: Input should be a valid integer"),
        ({"samples": 2}, r"shard.00000.mds holds 3 samples, and its index says 2"),
        ({"samples": 10**9}, r"shard.00000.mds holds 3 samples, and its index says 1000000000"),
        ({"column_names": ["text", "id"]}, r"shard.00000.mds has column_names \['id', 'text'\]"),
        ({"column_sizes": [8]}, r"column_names, column_encodings and column_sizes differ"),
        ({"format": "json"}, r"shards.0.format: Input should be 'mds'"),
        ({"column_names": ["text", "text"]}, r"shards.0: .*column_names has a name twice"),
    ],
)
def test_an_index_that_disagrees_with_its_shards(tmp_path, changes, said):
    text_shards(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0] |= changes
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises((ConfigError, CorruptError), match=said):
        read(tmp_path)


def test_a_shard_that_is_listed_twice_is_refused(tmp_path):
    text_shards(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"] *= 2
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"index.json lists the shard shard.00000.mds twice"):
        read(tmp_path)


def test_shards_that_are_not_listed_are_named(tmp_path, caplog):
    text_shards(tmp_path)
    shutil.copy(tmp_path / "shard.00000.mds", tmp_path / "shard.00007.mds")
    assert len(read(tmp_path)) == 3
    assert "does not list 1 files of shards, such as " in caplog.text
    assert "shard.00007.mds; they are not read" in caplog.text
    caplog.clear()
    write(tmp_path, [[[np.arange(4).tobytes()]]], ["tokens"], ["ndarray:int64:4"], [None])
    MdsTokens(tmp_path, 257, "local")
    assert "does not list 2 files of shards" in caplog.text


def test_an_index_that_is_nested_too_deep(tmp_path):
    (tmp_path / "index.json").write_text("[" * 200_000)
    with pytest.raises(ConfigError, match=r"is not an index of MDS shards: it is nested too deep"):
        read(tmp_path)


def test_the_folders_of_mosaicml_streaming(tmp_path):
    """The committed folders were written by the tool itself; see make.py beside them."""
    texts = [f"text {i}: " + "ü✓ " * (i % 5) for i in range(12)]
    shutil.copytree(STREAMING, tmp_path, dirs_exist_ok=True)
    for name in ("text", "text-gz", "text-zstd", "merged"):
        if name == "text-zstd":
            pytest.importorskip("zstandard")
        assert read(tmp_path / name) == [text.encode() for text in texts]
    for name in ("ids-ndarray", "ids-shaped", "ids-bytes"):
        tokens = MdsTokens(tmp_path / name, 257, "local", "int32")
        assert tokens.length == 8
        assert len(tokens._readers) > 1
        assert tokens[:].tolist() == list(range(96))


def test_the_hashes_of_mosaicml_streaming_are_checked(tmp_path):
    for folder in ("text", "merged"):
        shutil.copytree(STREAMING / folder, tmp_path / folder)
        shard = next(iter(sorted((tmp_path / folder).rglob("shard.00000.mds"))))
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        with pytest.raises(CorruptError, match=r"shard.00000.mds does not have the sha1 of its"):
            read(tmp_path / folder)


def test_new_folders_of_mosaicml_streaming(tmp_path):
    streaming = pytest.importorskip("streaming")
    with streaming.MDSWriter(out=str(tmp_path), columns={"text": "str"}) as writer:
        writer.write({"text": "one"})
    assert read(tmp_path) == [b"one"]


def both_columns(folder: Path) -> Path:
    samples = [[bytes([65 + i] * 30), np.full(30, i, dtype="<i4").tobytes()] for i in range(20)]
    names = ["text", "tokens"]
    return write(folder, [samples], names, ["str", "ndarray:int32:30"], [None, 120])


def test_text_key_chooses_between_text_and_ids(tmp_path, config):
    folder = str(both_columns(tmp_path / "both"))

    def ids(**keys):
        loader = {"name": "text", "dataset": {"local": folder} | keys}
        return build_data(config(train_loader=loader).data()).train.tokens

    assert ids(text_key="tokens")[:31].tolist() == [0] * 30 + [1]
    assert ids(text_key="text")[:32].tolist() == [65] * 30 + [256, 66]
    with pytest.raises(
        ConfigError, match=r"dataset.local '.*' has the columns 'text' and 'tokens'; say text_key"
    ):
        ids()
    with pytest.raises(ConfigError, match=r"has no column 'body'; it has text, tokens"):
        ids(text_key="body")


@pytest.mark.parametrize(
    ("written", "read", "vocab_size"),
    [
        ("int32", "uint16", 257),
        ("int32", "uint16", 150_000),
        ("int64", "uint16", 150_000),
        ("int64", "int32", 150_000),
        ("uint16", "uint8", 257),
    ],
)
def test_ids_that_are_read_too_narrow_are_refused(tmp_path, written, read, vocab_size):
    """Half of the ids would be 0, or the upper halves of large ones."""
    ids = np.random.default_rng(3).integers(0, vocab_size, size=(6, 24)).astype(written)
    folder = write(tmp_path, [[[row.tobytes()] for row in ids]], ["tokens"], ["bytes"], [None])
    with pytest.raises(ConfigError, match=rf"every second id .* is 0 as {read}, so .*wider ids"):
        MdsTokens(folder, vocab_size, "local", read)
    assert (MdsTokens(folder, vocab_size, "local", written)[:] == ids.ravel()).all()


@pytest.mark.parametrize(("written", "read"), [("uint16", "uint8"), ("int32", "uint8")])
def test_ids_in_a_dtype_that_cannot_hold_the_vocabulary_are_named(tmp_path, written, read, caplog):
    """All bytes are ids then, so that only the dtype tells."""
    ids = np.random.default_rng(3).integers(0, 60_000, size=(6, 24)).astype(written)
    folder = write(tmp_path, [[[row.tobytes()] for row in ids]], ["tokens"], ["bytes"], [None])
    length = 24 * ids.itemsize
    assert MdsTokens(folder, 100_277, "local", read).length == length
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(
        f"local: token_encoding_type is {read}, which holds ids up to 255, and the tokenizer has "
        "100277 ids; if"
    )
    assert said.endswith(f"samples of {length} ids each are read")
    caplog.clear()
    MdsTokens(folder, 60_000, "local", written)
    assert caplog.text == ""
