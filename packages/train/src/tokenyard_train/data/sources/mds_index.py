"""Read the index.json of a folder of MDS shards."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

from tokenyard import ConfigError
from tokenyard.bounded import require_plain
from tokenyard_train.data.json_text import parse_json

INDEX = "index.json"

_ENDS = (".mds", ".mds.zstd", ".mds.zst", ".mds.gz", ".mds.br", ".mds.snappy")

log = logging.getLogger("tokenyard")


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"a shard outside the folder: {name}")
    return name


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class ShardFile(_Entry):
    """A file of a shard."""

    basename: Annotated[str, AfterValidator(_inside)]  # with subfolders in a merged index
    bytes: NonNegativeInt
    hashes: dict[str, str] = {}  # hex digests by algorithm


class Shard(_Entry):
    """A shard that index.json lists."""

    format: Literal["mds"]
    version: Literal[2]
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[NonNegativeInt | None]  # bytes of each column; None or 0: variable
    compression: str | None = None
    samples: NonNegativeInt
    raw_data: ShardFile
    zip_data: ShardFile | None = None

    @model_validator(mode="after")
    def _equal_counts(self) -> Shard:
        names = len(self.column_names)
        if not names == len(self.column_encodings) == len(self.column_sizes):
            raise ValueError("column_names, column_encodings and column_sizes differ in length")
        if len(set(self.column_names)) < names:
            raise ValueError("column_names has a name twice")
        return self


class _Index(_Entry):
    version: Literal[2]
    shards: list[Shard]


def read_index(folder: Path, key: str) -> list[Shard]:
    """Return the non-empty shards that a folder's index.json lists.

    Raises ConfigError if the index is missing, malformed or without samples.
    """
    path = folder / INDEX
    require_plain(path)
    try:
        shards = _Index.model_validate(parse_json(path.read_bytes())).shards
    except FileNotFoundError:
        raise ConfigError(
            f"{key} {str(folder)!r} has no index.json; give a folder of MDS shards (see split)"
        ) from None
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{key}: {path} is not an index of MDS shards: {where}: {first['msg']}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{key}: {path} is not an index of MDS shards: {error}") from None
    if not sum(shard.samples for shard in shards):
        raise ConfigError(f"{key}: {path} lists no samples")
    counts = Counter(PurePosixPath(shard.raw_data.basename) for shard in shards)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ConfigError(f"{key}: {path} lists the shard {twice[0]} twice; merge the index anew")
    return [shard for shard in shards if shard.samples]


def warn_unlisted(folder: Path, shards: list[Shard]) -> None:
    """Warn of shards beside the listed ones that the folder's index does not list."""
    files = [file for s in shards for file in (s.raw_data, s.zip_data) if file is not None]
    listed = {folder / file.basename for file in files}
    unlisted = {
        path
        for parent in {path.parent for path in listed}
        for path in parent.glob("*.mds*")
        if path not in listed and path.name.endswith(_ENDS)
    }
    if unlisted:
        log.warning(
            "%s does not list %d files of shards, such as %s; they are not read",
            folder / INDEX,
            len(unlisted),
            min(unlisted),
        )


def index_files(folder: Path, key: str) -> list[Path]:
    """Return the files that identify a folder: its index, and its shards without hashes."""
    files = [folder / INDEX]
    for shard in read_index(folder, key):
        names = [file.basename for file in (shard.zip_data, shard.raw_data) if file is not None]
        if not shard.raw_data.hashes:
            # The compressed file comes first: reading puts the other one beside it.
            files.append(
                next((folder / n for n in names if (folder / n).exists()), folder / names[0])
            )
    return files
