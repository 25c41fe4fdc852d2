"""Write Delta tables with features that the deltalake library reads and does not write."""

import json
import struct
import uuid
import zlib

import pytest

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def commit(folder, version, *actions):
    """Write the actions of a version into the log."""
    log = folder / "_delta_log"
    log.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(action) + "\n" for action in actions)
    (log / f"{version:020}.json").write_text(text)


def protocol(*features):
    """Return the action that demands some features of readers."""
    listed = {"readerFeatures": list(features), "writerFeatures": list(features)}
    return {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7} | listed}


def metadata(fields, partitioned_by=(), **configuration):
    """Return the action that describes a table with these fields."""
    schema = {"type": "struct", "fields": fields}
    return {
        "metaData": {
            "id": "a table",
            "format": {"provider": "parquet", "options": {}},
            "schemaString": json.dumps(schema),
            "partitionColumns": list(partitioned_by),
            "configuration": configuration,
            "createdTime": 1,
        }
    }


def field(name, kind="string", stored=None, number=1):
    """Return a field of a schema; `stored` is its name in data files."""
    mapping = {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": stored}
    return {"name": name, "type": kind, "nullable": True, "metadata": mapping if stored else {}}


def added(folder, path, rows, deleted=(), partition=None):
    """Return the action that adds a data file of some rows, without those that are deleted."""
    action = {
        "path": path.replace("%", "%25"),
        "partitionValues": partition or {},
        "size": (folder / path).stat().st_size,
        "modificationTime": 1,
        "dataChange": True,
        "stats": json.dumps({"numRecords": rows}),
    }
    if deleted:
        bitmap = _bitmap(deleted)
        action["deletionVector"] = {
            "storageType": "i",
            "pathOrInlineDv": _base85(bitmap),
            "sizeInBytes": len(bitmap),
            "cardinality": len(deleted),
        }
    return {"add": action}


def _bitmap(rows):
    """Return a 64-bit Roaring bitmap of rows below 2^16, as the protocol stores it."""
    container = struct.pack("<IIHHI", 12346, 1, 0, len(rows) - 1, 16)
    values = struct.pack(f"<{len(rows)}H", *sorted(rows))
    return struct.pack("<iQI", 1681511377, 1, 0) + container + values


def _base85(content):
    """Return bytes in Z85, padded with zeros."""
    padded = content + b"\0" * (-len(content) % 4)
    powers = [85**i for i in (4, 3, 2, 1, 0)]
    return "".join(
        _DIGITS[value // power % 85]
        for (value,) in struct.iter_unpack(">I", padded)
        for power in powers
    )


def commit_info(operation):
    """Return the action that Spark writes first in each version."""
    return {
        "commitInfo": {
            "timestamp": 1754750000000,
            "operation": operation,
            "operationParameters": {"mode": "Append", "partitionBy": "[]"},
            "isolationLevel": "Serializable",
            "isBlindAppend": True,
            "operationMetrics": {"numFiles": "1"},
            "engineInfo": "Apache-Spark/4.0.0 Delta-Lake/4.0.0",
            "txnId": "5a0d2a3c-4b8f-4c0e-9d2b-0e8f4a5b6c7d",
        }
    }


def stored_bitmap(folder, action, rows):
    """Give the action of a file a deletion vector in a file beside it, as Spark writes them."""
    number = uuid.UUID(int=7)
    bitmap = _bitmap(rows)
    file = folder / "ab" / f"deletion_vector_{number}.bin"
    file.parent.mkdir(exist_ok=True)
    size, checksum = struct.pack(">I", len(bitmap)), struct.pack(">I", zlib.crc32(bitmap))
    file.write_bytes(b"\1" + size + bitmap + checksum)
    action["add"]["deletionVector"] = {
        "storageType": "u",
        "pathOrInlineDv": "ab" + _base85(number.bytes),
        "offset": 1,
        "sizeInBytes": len(bitmap),
        "cardinality": len(rows),
    }


def write_checkpoint(path, actions):
    """Write a checkpoint, or its sidecar, with a row of each action."""
    text, whole, map_type = pyarrow.string(), pyarrow.int64(), pyarrow.map_
    names = pyarrow.list_(text)
    words = map_type(text, text)
    versions = [("minReaderVersion", pyarrow.int32()), ("minWriterVersion", pyarrow.int32())]
    vector = [("storageType", text), ("pathOrInlineDv", text), ("offset", pyarrow.int32())]
    vector += [("sizeInBytes", pyarrow.int32()), ("cardinality", whole)]
    columns = {
        "protocol": [*versions, ("readerFeatures", names), ("writerFeatures", names)],
        "metaData": [
            ("id", text),
            ("format", pyarrow.struct([("provider", text), ("options", words)])),
            ("schemaString", text),
            ("partitionColumns", names),
            ("configuration", words),
            ("createdTime", whole),
        ],
        "add": [
            ("path", text),
            ("partitionValues", words),
            ("size", whole),
            ("modificationTime", whole),
            ("dataChange", pyarrow.bool_()),
            ("stats", text),
            ("deletionVector", pyarrow.struct(vector)),
        ],
        "remove": [("path", text), ("deletionTimestamp", whole), ("dataChange", pyarrow.bool_())],
        "checkpointMetadata": [("version", whole)],
        "sidecar": [("path", text), ("sizeInBytes", whole), ("modificationTime", whole)],
    }
    schema = pyarrow.schema([(name, pyarrow.struct(kinds)) for name, kinds in columns.items()])
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(map(_as_pairs, actions)), schema), path)


def _as_pairs(value, name=""):
    """Return an action whose maps are lists of pairs, as pyarrow takes them."""
    if not isinstance(value, dict):
        return value
    if name in ("partitionValues", "configuration", "options"):
        return list(value.items())
    return {key: _as_pairs(item, key) for key, item in value.items()}
