"""Delta tables whose log has what Spark and Databricks write, by the protocol's specification.

Delta's library for Spark is not in a package index, so the logs are written here, field by field.
"""

import json

import pytest

from tokenyard import ConfigError
from tokenyard_train.data.schema import Source
from tokenyard_train.data.sources import read_documents

from .delta_tables import (
    added,
    commit,
    commit_info,
    field,
    metadata,
    protocol,
    stored_bitmap,
    write_checkpoint,
)

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed")


def read(folder, **source):
    documents = read_documents(Source(delta=str(folder), **source), "dataset")
    return [document.decode() for document in documents]


def data_file(folder, name, texts, **options):
    """Write a data file; return the action that adds it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"text": texts}), path)
    return added(folder, name, len(texts), **options)


@pytest.fixture
def table(tmp_path):
    """A table of four versions, its log from a checkpoint of version 2 on not written yet."""
    first = [commit_info("CREATE TABLE"), protocol("deletionVectors", "v2Checkpoint")]
    configuration = {"delta.checkpointPolicy": "v2", "delta.enableDeletionVectors": "true"}
    first.append(metadata([field("text"), field("lang")], ["lang"], **configuration))
    commit(tmp_path, 0, *first)
    files = [
        data_file(tmp_path, f"lang={lang}/part-{i}.c000.snappy.parquet", texts, partition=partition)
        for i, (lang, texts, partition) in enumerate(
            [
                ("en", ["one", "two", "three"], {"lang": "en"}),
                ("__HIVE_DEFAULT_PARTITION__", ["four"], {"lang": None}),
                ("a%3Ab", ["five", "six"], {"lang": "a:b"}),
            ]
        )
    ]
    commit(tmp_path, 1, commit_info("WRITE"), *files)
    stored_bitmap(tmp_path, files[0], [1])
    removed = {"path": files[0]["add"]["path"], "deletionTimestamp": 1, "dataChange": True}
    commit(tmp_path, 2, commit_info("DELETE"), {"remove": removed}, files[0])
    last = data_file(tmp_path, "lang=en/part-9.parquet", ["seven"], partition={"lang": "en"})
    commit(tmp_path, 3, commit_info("WRITE"), last)
    return tmp_path, [*first[1:], *files]


def forget(folder, size, **fields):
    """Delete the log before the checkpoint of version 2, as Spark does after 30 days."""
    log = folder / "_delta_log"
    for version in range(3):
        (log / f"{version:020}.json").unlink()
    (log / "_last_checkpoint").write_text(json.dumps({"version": 2, "size": size} | fields))


def classic(folder, actions):
    write_checkpoint(folder / "_delta_log" / f"{2:020}.checkpoint.parquet", actions)
    forget(folder, len(actions))


def of_parts(folder, actions):
    parts = (actions[:3], actions[3:])
    for number, part in enumerate(parts, 1):
        name = f"{2:020}.checkpoint.{number:010}.{len(parts):010}.parquet"
        write_checkpoint(folder / "_delta_log" / name, part)
    forget(folder, len(actions), parts=len(parts))


def with_sidecars(folder, actions):
    log = folder / "_delta_log"
    head = [action for action in actions if "add" not in action]
    files = [action for action in actions if "add" in action]
    head.append({"checkpointMetadata": {"version": 2}})
    for number, part in enumerate((files[:1], files[1:])):
        name = f"3a0d65cd-4056-49b8-937b-95f9e3ee90e{number}.parquet"
        write_checkpoint(log / "_sidecars" / name, part)
        size = (log / "_sidecars" / name).stat().st_size
        head.append({"sidecar": {"path": name, "sizeInBytes": size, "modificationTime": 1}})
    name = f"{2:020}.checkpoint.80a083e8-7026-4e79-81be-64bd76c43a11"
    return log / name, head


def parquet_with_sidecars(folder, actions):
    path, head = with_sidecars(folder, actions)
    write_checkpoint(path.with_name(f"{path.name}.parquet"), head)
    forget(folder, len(actions))


def json_with_sidecars(folder, actions):
    path, head = with_sidecars(folder, actions)
    lines = "".join(json.dumps(action) + "\n" for action in head)
    path.with_name(f"{path.name}.json").write_text(lines)
    forget(folder, len(actions))


CHECKPOINTS = [classic, of_parts, parquet_with_sidecars, json_with_sidecars]


@pytest.mark.parametrize("checkpoint", [None, *CHECKPOINTS])
def test_a_table_is_read_from_its_commits_and_from_each_kind_of_checkpoint(table, checkpoint):
    """Partition values, one of them null, and a deletion vector in a file of its own."""
    folder, actions = table
    if checkpoint is None:
        assert read(folder, version=1) == ["four", "five", "six", "one", "two", "three"]
    else:
        checkpoint(folder, actions)
        with pytest.raises(ConfigError, match=r"dataset.version is 1, which .* no longer holds"):
            read(folder, version=1)
    assert read(folder, version=2) == ["four", "five", "six", "one", "three"]
    assert read(folder) == ["four", "five", "six", "one", "three", "seven"]
    assert read(folder, text_key="lang") == ["a:b", "a:b", "en", "en", "en"]


@pytest.mark.parametrize("feature", ["catalogManaged", "typeWidening", "variantType", "newer"])
def test_features_of_readers_that_are_not_supported_are_named(tmp_path, feature):
    file = data_file(tmp_path, "part-0.parquet", ["one"])
    commit(tmp_path, 0, commit_info("WRITE"), protocol(feature), metadata([field("text")]), file)
    with pytest.raises(ConfigError, match=f"^dataset.delta '.*{feature}.*$") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_features_of_writers_alone_change_no_row(tmp_path):
    """Row tracking, clustering and constraints concern those who write the table."""
    file = data_file(tmp_path, "part-0.parquet", ["one"])
    file["add"] |= {"baseRowId": 0, "defaultRowCommitVersion": 0, "clusteringProvider": "liquid"}
    features = ["appendOnly", "invariants", "clustering", "domainMetadata", "rowTracking"]
    written = {"minReaderVersion": 1, "minWriterVersion": 7, "writerFeatures": features}
    domain = {"domain": "delta.clustering", "configuration": "{}", "removed": False}
    actions = [{"protocol": written}, metadata([field("text")]), {"domainMetadata": domain}, file]
    commit(tmp_path, 0, commit_info("CREATE TABLE AS SELECT"), *actions)
    assert read(tmp_path) == ["one"]


def test_a_shallow_clone_is_refused(tmp_path):
    """Its files are those of another table, by absolute paths."""
    file = data_file(tmp_path / "source", "part-0.parquet", ["one"])
    file["add"]["path"] = (tmp_path / "source" / "part-0.parquet").as_uri()
    plain = {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}}
    commit(tmp_path / "clone", 0, commit_info("CLONE"), plain, metadata([field("text")]), file)
    with pytest.raises(ConfigError, match=r"has files outside of its folder, as a shallow clone"):
        read(tmp_path / "clone")
