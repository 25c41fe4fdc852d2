"""The journal of an unfinished packing: the chunks whose ids are on disk, with their digests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tokenyard import ConfigError
from tokenyard.bounded import require_plain
from tokenyard_train.data.json_text import parse_json
from tokenyard_train.data.tokens import DOCUMENTS, JOURNAL, TOKENS, CorruptError

JOURNAL_FORMAT = 3
_ANEW = "copy the folder again, or pack anew with --overwrite"


class PackProgress(NamedTuple):
    """Counts of what is packed so far."""

    chunks: int = 0
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0


class JournalEntry(NamedTuple):
    """The record of a chunk."""

    done: PackProgress  # counts after the chunk
    packed_digest: str  # of the chunk's ids and document ends
    text_digest: str


def journal_line(done: PackProgress, ids: bytes, ends: bytes, text_digest: str) -> str:
    """Return the line that records a chunk: the counts after it, and digests of its content."""
    return json.dumps([*done, _digest(ids, ends), text_digest]) + "\n"


def read_journal(folder: Path, settings: dict[str, Any], itemsize: int) -> list[JournalEntry]:
    """Return the finished chunks of an unfinished packing, after a comparison with the files.

    Raises ConfigError if the journal is of other `settings`, CorruptError if the journal is damaged
    or the files are not as it records.
    """
    journal = folder / JOURNAL
    if not journal.exists():
        return []
    # An interrupted write leaves text after the last line end.
    lines = journal.read_bytes().split(b"\n")[:-1]
    if len(lines) < 2:
        return []  # nothing is packed yet, so nothing is lost by packing anew
    recorded = _parse(lines[0], journal)
    if recorded != settings:
        raise ConfigError(
            f"{str(folder)!r} holds an unfinished packing of {_difference(recorded, settings)}; "
            "give the same text and tokenizer to resume, another folder, or --overwrite"
        )
    entries = [_entry(line, journal) for line in lines[1:]]
    _check_files(folder, entries, itemsize)
    return entries


def recorded_sources(folder: Path) -> list[dict[str, Any]]:
    """Return the sources of an unfinished packing; none if there is no journal or no first line."""
    require_plain(folder / JOURNAL)
    try:
        with (folder / JOURNAL).open("rb") as journal:
            sources = parse_json(journal.readline()).get("sources")
    except (OSError, ValueError, AttributeError):
        return []
    return [source for source in sources or [] if isinstance(source, dict)]


def _difference(recorded: Any, settings: dict[str, Any]) -> str:
    """Say what an unfinished packing has other than the settings."""
    if not isinstance(recorded, dict) or not isinstance(recorded.get("sources"), list):
        return "another format"
    if recorded.get("tokenizer") != settings["tokenizer"]:
        return "another tokenizer"
    before = recorded["sources"]
    now = settings["sources"]
    changed = [s for s in before if s not in now] + [s for s in now if s not in before]
    if changed:
        name = changed[0].get("file") if isinstance(changed[0], dict) else None
        return f"other text ({name or changed[0]} is new, gone or changed)"
    return "another version" if before == now else "the same text in another order"


def _check_files(folder: Path, entries: list[JournalEntry], itemsize: int) -> None:
    """Compare each recorded chunk with the files. Raises CorruptError."""
    if not entries:
        return
    last = entries[-1].done
    for name, size in ((TOKENS, last.tokens * itemsize), (DOCUMENTS, last.documents * 8)):
        path = folder / name
        has = path.stat().st_size if path.exists() else 0
        if has < size:
            raise CorruptError(
                f"{path} has {has} bytes, and {folder / JOURNAL} records {size}; {_ANEW}"
            )
    before = PackProgress()
    with (folder / TOKENS).open("rb") as tokens, (folder / DOCUMENTS).open("rb") as documents:
        for done, digest, _ in entries:
            _check_order(before, done, folder / JOURNAL)
            ids = _read(tokens, (done.tokens - before.tokens) * itemsize)
            ends = _read(documents, (done.documents - before.documents) * 8)
            if _digest(ids, ends) != digest:
                raise CorruptError(
                    f"{folder / TOKENS} or {DOCUMENTS} was changed since it was packed, "
                    f"in chunk {done.chunks}; {_ANEW}"
                )
            before = done


def _check_order(before: PackProgress, done: PackProgress, journal: Path) -> None:
    grows = all(old <= new for old, new in zip(before, done))
    if not grows or done.chunks != before.chunks + 1:
        raise CorruptError(f"{journal} records no order of chunks; {_ANEW}")


def _read(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    assert len(content) == size  # the sizes were compared before
    return content


def _entry(line: bytes, journal: Path) -> JournalEntry:
    entry = _parse(line, journal)
    counts = entry[:4] if isinstance(entry, list) and len(entry) == 6 else []
    sound = len(counts) == 4 and all(type(n) is int and n >= 0 for n in counts)
    if not sound or not all(isinstance(digest, str) for digest in entry[4:]):
        raise CorruptError(f"{journal} holds a line that is no record of a chunk; {_ANEW}")
    return JournalEntry(PackProgress(*counts), *entry[4:])


def _parse(line: bytes, journal: Path) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        raise CorruptError(f"{journal} holds a line that is not JSON; {_ANEW}") from None


def _digest(ids: bytes, ends: bytes) -> str:
    digest = hashlib.sha256(ids)
    digest.update(ends)
    return digest.hexdigest()
