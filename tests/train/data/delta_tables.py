"""Write Delta tables with features that the deltalake library reads and does not write."""

import json
import struct

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
