"""Spark packs the bytes that `data pack` packs, whatever fails on the way."""

import json
import os
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from tokenyard import ConfigError, TokenyardError
from tokenyard_train.data import CorruptError, TokenFile, build_tokenizer
from tokenyard_train.data.packing import pack as pack_here
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.spark.driver import reason_of
from tokenyard_train.data.spark.executor import ShardWriter

pyarrow = pytest.importorskip("pyarrow")

ROWS = [(i, f"document {i} " * (i % 9), i % 7) for i in range(600)]
TEXTS = [text.encode() for _, text, _ in ROWS if text]


def writer(folder):
    identity = build_tokenizer(TokenizerConfig()).identity
    return ShardWriter(str(folder), {"name": "bytes"}, identity, "body")


def batches(*rows):
    keys, texts = zip(*rows)
    yield pyarrow.RecordBatch.from_pydict({"order0": keys, "text": texts})


def test_a_task_writes_a_shard_of_its_own(tmp_path):
    rows = [(1, "one"), (2, None), (3, ""), (4, "four ✓")]
    shards = [writer(tmp_path).write(5, batches(*rows)) for _ in range(2)]
    assert shards[0].name != shards[1].name
    for shard in shards:
        ids = (tmp_path / f"{shard.name}.ids").read_bytes()
        assert ids[:8] == b"o\0n\0e\0\0\1"
        assert (shard.documents, shard.nulls, shard.text_bytes, shard.tokens) == (2, 1, 11, 13)
    assert shards[0].digest == shards[1].digest


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([(1, "a"), (1, "b")], r"two rows have the order \[1\], so the result would differ"),
        ([(None, "a")], r"a row has null or NaN in its order \[None\]"),
        ([(float("nan"), "a")], r"a row has null or NaN in its order \[nan\]"),
        ([(1, b"\xff")], r"the row of order \[1\] is not UTF-8 text"),
        ([(1, 5)], r"the row of order \[1\]: 'body' holds a number; text is a string"),
    ],
)
def test_rows_without_an_order_or_text_are_refused(tmp_path, rows, sentence):
    with pytest.raises(ConfigError, match=sentence):
        writer(tmp_path).write(0, batches(*rows))


def test_a_tokenizer_that_differs_on_an_executor_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="other content on an executor than on the driver"):
        writer(tmp_path)._replace(tokenizer="other").write(0, batches((1, "a")))


@pytest.fixture(scope="module")
def session():
    """A session of Spark with four executors, each a process."""
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java, which is not installed")
    if find_spec("pyspark") is None:
        pytest.skip("pyspark is not installed")
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    options = {
        "spark.ui.enabled": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.sql.shuffle.partitions": "5",
        "spark.sql.adaptive.coalescePartitions.enabled": "false",
        "spark.sql.execution.arrow.maxRecordsPerBatch": "50",
    }
    builder = SparkSession.builder.master("local-cluster[4,1,1024]")
    for key, value in options.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    yield spark
    spark.stop()


@pytest.fixture
def frame(session):
    """600 rows in another order than their number, in seven partitions."""
    rows = sorted(ROWS, key=lambda row: (row[2], -row[0]))
    return session.createDataFrame(rows, "n long, body string, part long").repartition(7, "part")


@pytest.fixture
def expected(tmp_path):
    """What `data pack` makes of the rows in order."""
    folder = tmp_path / "expected"
    pack_here(folder, lambda: TEXTS, TokenizerConfig(), [], 1, lambda done: None)
    return folder


def same_files(folder, expected):
    names = ("tokens.bin", "documents.bin", "hashes.bin")
    assert all((folder / name).read_bytes() == (expected / name).read_bytes() for name in names)
    TokenFile(folder).verify()
    assert TokenFile(folder).identity() == TokenFile(expected).identity()
    left = {path.name for path in folder.iterdir()} - {".lock"}
    assert left == {"manifest.json", *names}


def executor_of(worker):
    """Return the process id of the executor that started a process of Python."""
    command = Path(f"/proc/{worker}/cmdline").read_text()
    if "CoarseGrainedExecutorBackend" in command:
        return worker
    return executor_of(int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1]))


class KilledOnce(ShardWriter):
    """Kills the executor of a partition after it wrote a shard, and before it returned it."""

    def write(self, partition, rows):
        shard = super().write(partition, rows)
        marker = Path(self.folder).parent.with_name("killed")
        if partition == 2 and not marker.exists():
            marker.touch()
            os.kill(executor_of(os.getpid()), signal.SIGKILL)
        return shard


@pytest.mark.full
def test_the_bytes_are_those_of_data_pack(frame, expected, tmp_path, monkeypatch):
    """In every partitioning, and with an executor that is killed after it wrote a shard."""
    from pyspark import cloudpickle

    from tokenyard_train.data.spark import pack

    for partitions in (1, 7):
        out = tmp_path / f"out{partitions}"
        done = pack(frame.repartition(partitions), out, "n", text_key="body")
        assert (done.documents, done.tokens) == (len(TEXTS), len(TokenFile(expected)))
        same_files(out, expected)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr("tokenyard_train.data.spark.driver.ShardWriter", KilledOnce)
    pack(frame, tmp_path / "killed-run", ["n", "part"], text_key="body")
    assert (tmp_path / "killed").exists()
    same_files(tmp_path / "killed-run", expected)


@pytest.mark.full
def test_mistakes_are_one_sentence(frame, tmp_path):
    from tokenyard_train.data.spark import pack

    for order, text_key, sentence in (
        ("part", "body", r"two rows have the order \[\d\], so the result would differ"),
        ("m", "body", r"order names 'm', and the DataFrame has n, body, part"),
        ("n", "text", r"the DataFrame has no column 'text'; it has n, body, part"),
        ([], "body", r"order names no column"),
        ("n", "part", r"'part' holds a number; text is a string"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            pack(frame, tmp_path / "out", order, text_key=text_key)
    twice = frame.join(frame.withColumnRenamed("n", "m"), "part")
    with pytest.raises(ConfigError, match=r"cannot be sorted by n: \[AMBIGUOUS_REFERENCE\]"):
        pack(twice, tmp_path / "out", "n", text_key="body")
    collated = frame.selectExpr("cast(n as string) collate UTF8_LCASE as n", "body")
    with pytest.raises(ConfigError, match="whose collation UTF8_LCASE sorts different strings"):
        pack(collated, tmp_path / "out", "n", text_key="body")
    assert not list((tmp_path / "out").glob(".shards*"))
    pack(frame, tmp_path / "out", "n", text_key="body")
    with pytest.raises(ConfigError, match="is packed already"):
        pack(frame, tmp_path / "out", "n", text_key="body")
    pack(frame, tmp_path / "out", "n", text_key="body", overwrite=True)


@pytest.mark.full
def test_shards_that_are_not_shared_or_were_changed_are_refused(frame, tmp_path, monkeypatch):
    from tokenyard_train.data.spark import driver

    run = driver._run

    def lost(rows, write):
        parts = run(rows, write)
        Path(write.folder, f"{parts[0].name}.ids").unlink()
        return parts

    def changed(rows, write):
        parts = run(rows, write)
        with Path(write.folder, f"{parts[0].name}.ids").open("r+b") as file:
            file.write(b"xx")
        return parts

    for fault, error in ((lost, TokenyardError), (changed, CorruptError)):
        monkeypatch.setattr(driver, "_run", fault)
        with pytest.raises(error, match=r"that (the driver and )?all executors share"):
            driver.pack(frame, tmp_path / "out", "n", text_key="body")
        assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.full
def test_the_command_packs_a_folder_of_files(session, tokenyard, expected, tmp_path):
    lines = [json.dumps({"n": n, "body": text}) for n, text, _ in reversed(ROWS)]
    (tmp_path / "rows.json").write_text("\n".join(lines))
    out = tmp_path / "out"
    source = (str(out), str(tmp_path / "rows.json"), "--format", "json", "--text-key", "body")
    code, _, error = tokenyard("data", "spark", *source, "--order", "n")
    assert (code, error) == (0, "")
    same_files(out, expected)
    assert TokenFile(out).manifest["sources"][0]["order"] == ["n"]
    code, _, error = tokenyard("data", "spark", *source[:2], "--order", "n")
    assert code == 2
    assert "; for a path, give --format, such as" in " ".join(error.split())
    code, _, error = tokenyard("data", "spark", str(out), "no_such_table", "--order", "n")
    assert code == 2
    assert error.startswith("error: SOURCE 'no_such_table' cannot be read: [TABLE_OR_VIEW_NOT_FO")


def test_the_files_of_a_delta_table_are_not_packed_as_parquet(tokenyard, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyspark", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "pyspark.sql", SimpleNamespace())
    (tmp_path / "table" / "_delta_log").mkdir(parents=True)
    source = (str(tmp_path / "out"), str(tmp_path / "table"), "--format", "parquet")
    code, _, error = tokenyard("data", "spark", *source, "--order", "n")
    assert code == 2
    assert "is a Delta table, whose files have deleted" in " ".join(error.split())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[TABLE_OR_VIEW_NOT_FOUND] no table\nat line 1", "[TABLE_OR_VIEW_NOT_FOUND] no table"),
        (
            "An error occurred while calling o27.load.\n: java.X: no delta\n\tat a",
            "java.X: no delta",
        ),
    ],
)
def test_the_reason_of_spark_is_its_first_line(text, reason):
    assert reason_of(Exception(text)) == reason


def test_the_library_is_named_if_it_is_missing(tokenyard, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark", None)
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    code, _, error = tokenyard("data", "spark", "out", "table", "--order", "n")
    assert code == 2
    assert 'pip install "tokenyard-train[spark]"' in " ".join(error.split())


def test_an_error_of_a_task_hides_the_secrets_of_the_environment(monkeypatch):
    """Errors of executors repeat options of the storage."""
    from tokenyard_train.data.spark import driver

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a/secret+key")
    rows = Mock()
    rows.mapInArrow.side_effect = OSError("task 3 failed\n  OSError: a/secret+key is refused")
    with pytest.raises(TokenyardError, match=r"task 3 failed ... OSError: \*\*\* is refused$"):
        driver._run(rows, writer("."))
