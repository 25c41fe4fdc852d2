"""Paths in configs: local ones, with ~ for the home folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from urllib.request import url2pathname

from pydantic import AfterValidator

from tokenyard import ConfigError

HF = "hf://"
"""Prefix of load_path for the folder of a Hugging Face model."""

UNITY_CATALOG = "uc://"
"""Prefix of a table's name in Unity Catalog."""

DELTA_LOG = "_delta_log"
"""Subfolder by which a folder is a Delta table."""

_TABLE_NAME = re.compile(r"[^./:@\s]+(\.[^./:@\s]+){2}")
_CLOUDS = ("s3", "s3a", "gs", "az", "abfs", "abfss")
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a drive letter such as C: is local


def local_path(path: str) -> str:
    """Return a path with ~ expanded. Raises ValueError for a remote path such as s3://bucket."""
    if _REMOTE.match(path):
        scheme = path.partition(":")[0]
        raise ValueError(
            f"{path!r} is a remote path, and only local folders and files are read and written; "
            f"copy or mount what {scheme} holds, and give the local path"
        )
    return str(Path(path).expanduser()) if path.startswith("~") else path


def local_output(path: Path | str) -> Path:
    """Return an output folder. Raises ConfigError for a remote path."""
    try:
        return Path(local_path(str(path)))
    except ValueError as error:
        raise ConfigError(f"the output folder {error}") from None


def _local_or_hf(path: str) -> str:
    prefix = HF if path.startswith(HF) else ""
    return prefix + local_path(path.removeprefix(prefix))


def is_table_name(text: str) -> bool:
    """Return whether a text has the form catalog.schema.table."""
    return _TABLE_NAME.fullmatch(text) is not None


def table_path(path: str) -> str:
    """Return the local path or the URI of a table. Raises ValueError for another scheme.

    A URI with a password or a query is refused: configs are saved, and sent to trackers.
    """
    if path.startswith(UNITY_CATALOG):
        if not is_table_name(path.removeprefix(UNITY_CATALOG)):
            raise ValueError(
                "give uc:// and a name catalog.schema.table, with version as a key of its own"
            )
        return path
    scheme, _, rest = path.partition("://")
    if _REMOTE.match(path) and scheme not in ("file", *_CLOUDS):
        raise ValueError(
            "give a local folder, such as /dbfs/tables/articles, uc://catalog.schema.table, or a "
            f"URI that starts with {', '.join(f'{cloud}://' for cloud in _CLOUDS)}"
        )
    if scheme == "file":
        if not rest.startswith("/"):
            raise ValueError("it names a host; give file:///folder, or the path alone")
        return url2pathname(rest)
    if "@" in rest and ":" in rest.partition("@")[0]:
        raise ValueError("it holds a password; give that in the environment of the storage")
    if scheme in _CLOUDS and "?" in rest:
        raise ValueError("it holds a query, as signed URLs do; give credentials in the environment")
    return path if scheme in _CLOUDS else local_path(path)


TablePath = Annotated[str, AfterValidator(table_path)]
"""A local path, a URI of the cloud storage that deltalake reads, or uc://catalog.schema.table."""

LocalPath = Annotated[str, AfterValidator(local_path)]
"""A path of a file or folder on this machine."""

WeightsPath = Annotated[str, AfterValidator(_local_or_hf)]
"""A local path, with or without hf:// before it."""
