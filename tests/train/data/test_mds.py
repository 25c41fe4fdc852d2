"""Read MDS shards as text or as token ids. The shards are written from the published format."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from tokenyard import ConfigError
from tokenyard_train.data import CorruptError, build_data
from tokenyard_train.data.schema import Source
from tokenyard_train.data.sources import read_documents
from tokenyard_train.data.sources.mds import MdsTokens

TEXTS = ["one", "zwei — ü", "", "four\nlines"]


def write(folder: Path, shards, names, encodings, sizes, compress=None) -> Path:
    """Write shards and their index. A shard is a list of samples, a sample the bytes per column."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, samples in enumerate(shards):
        header = json.dumps({"column_names": names}).encode()
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
            "column_names": names, "column_encodings": encodings, "column_sizes": sizes,
            "format": "mds", "version": 2, "samples": len(samples), "size_limit": 1 << 26,
            "raw_data": {"basename": name, "bytes": len(raw), "hashes": {}}, "zip_data": None,
            "hashes": [], "compression": None,
        }  # fmt: skip
        if compress is None:
            (folder / name).write_bytes(raw)
        else:
            packed = compress(raw)
            (folder / f"{name}.zstd").write_bytes(packed)
            hashes = {"sha1": hashlib.sha1(packed).hexdigest(), "xxh64": "not computable here"}
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
            r"index.json is not an index of MDS shards: KeyError\('shards'\)",
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


def test_samples_of_several_lengths_are_refused(tmp_path):
    samples = [[np.arange(n, dtype=np.int64).tobytes()] for n in (5, 5, 4)]
    write(tmp_path, [samples], ["tokens"], ["bytes"], [None])
    with pytest.raises(
        ConfigError, match=r"holds samples of several lengths; pack the text instead"
    ):
        MdsTokens(tmp_path, 257, "local")
