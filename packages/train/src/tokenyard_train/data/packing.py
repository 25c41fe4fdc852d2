"""Pack text into a folder of token ids that TokenFile reads. An interrupted run is resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tokenyard import ConfigError, TokenyardError
from tokenyard.bounded import require_plain
from tokenyard_train.data.encoding import (
    EncodedChunk,
    digest_text,
    encode_chunks,
    split_chunks,
)
from tokenyard_train.data.journal import (
    JOURNAL_FORMAT,
    JournalEntry,
    PackProgress,
    journal_line,
    read_journal,
)
from tokenyard_train.data.paths import local_output
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.text_loss import TextLoss
from tokenyard_train.data.tokenizer import Tokenizer, build_tokenizer
from tokenyard_train.data.tokens import (
    BLOCK_BYTES,
    DOCUMENTS,
    FORMAT,
    HASHES,
    JOURNAL,
    MANIFEST,
    TOKENS,
    CorruptError,
    ids_dtype,
    manifest_digest,
)
from tokenyard_train.folder_lock import LOCK, lock_folder

CHUNK_BYTES = 4 << 20  # text per chunk, at least; documents are never split
UNFINISHED_MANIFEST = MANIFEST + ".unfinished"
PACKED_FILES = frozenset((MANIFEST, TOKENS, DOCUMENTS, HASHES, JOURNAL, UNFINISHED_MANIFEST))


def pack(
    folder: Path,
    documents: Callable[[], Iterable[bytes]],
    config: TokenizerConfig,
    sources: list[dict[str, Any]],
    workers: int,
    report: Callable[[PackProgress], None],
    overwrite: bool = False,
) -> PackProgress:
    """Tokenize documents into a packed folder, and return the final counts.

    `documents` yields UTF-8 texts in a fixed order; `sources` describes them in the manifest.
    `report` is called at the start and after each chunk. The output does not depend on `workers` or
    on interruptions: one rule cuts the text into chunks, ids are appended in order, and a journal
    records each finished chunk. Raises ConfigError if the folder holds another packing, if text
    that was packed has changed, or if another process packs there, TokenyardError if the folder
    cannot be written or is damaged.
    """
    folder = local_output(folder)
    tokenizer = build_tokenizer(config)
    settings = packing_settings(tokenizer, sources)
    try:
        with lock_folder(folder):
            if overwrite:
                delete_packed(folder)
            entries = _start_or_resume(folder, settings, ids_dtype(tokenizer.vocab_size).itemsize)
            done = entries[-1].done if entries else PackProgress()
            report(done)
            chunks = split_chunks(documents(), CHUNK_BYTES)
            _skip_packed(chunks, entries, folder)
            encoded = encode_chunks(chunks, config, workers)
            done = _append(folder, encoded, done, tokenizer, report)
            finish_packing(folder, settings, done, tokenizer)
    except OSError as error:
        raise TokenyardError(
            f"{folder} cannot be written: {error.strerror}; what is packed so far is kept"
        ) from None
    return done


def packing_settings(tokenizer: Tokenizer, sources: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the journal's first line records: equal settings give equal bytes."""
    return {
        "format": FORMAT,
        "journal": JOURNAL_FORMAT,
        "tokenizer": tokenizer.identity,
        "sources": sources,
        "chunk_bytes": CHUNK_BYTES,
    }


def delete_packed(folder: Path) -> None:
    """Delete the files of a packed folder. Raises ConfigError if it holds any other file."""
    allowed = {*PACKED_FILES, LOCK}
    others = sorted(path.name for path in folder.iterdir() if path.name not in allowed)
    if others:
        raise ConfigError(
            f"--overwrite deletes a packed folder, and {str(folder)!r} holds something else: "
            f"{others[0]}"
        )
    for name in PACKED_FILES:
        (folder / name).unlink(missing_ok=True)


def sync(file: Any) -> None:
    """Write a file through to its disk."""
    file.flush()
    os.fsync(file.fileno())


def _start_or_resume(folder: Path, settings: dict[str, Any], itemsize: int) -> list[JournalEntry]:
    """Start a journal or resume an existing one, and truncate the files to what it records.

    Returns the chunks that it records.
    """
    for name in PACKED_FILES:
        require_plain(folder / name)
    if (folder / MANIFEST).exists():
        raise ConfigError(f"{str(folder)!r} is packed already; give another folder, or --overwrite")
    journal = folder / JOURNAL
    entries = read_journal(folder, settings, itemsize)
    done = entries[-1].done if entries else PackProgress()
    lines = journal.read_bytes().split(b"\n")[:-1] if entries else []
    lines = lines or [json.dumps(settings).encode()]
    journal.write_bytes(b"".join(line + b"\n" for line in lines))
    for name, size in ((TOKENS, done.tokens * itemsize), (DOCUMENTS, done.documents * 8)):
        with (folder / name).open("ab") as file:
            file.truncate(size)
    return entries


def _skip_packed(
    chunks: Iterator[list[bytes]], entries: Iterable[JournalEntry], folder: Path
) -> None:
    """Read the chunks that are packed already. Raises ConfigError if one has changed since."""
    for entry in entries:
        if digest_text(next(chunks, [])) != entry.text_digest:
            raise ConfigError(
                f"{str(folder)!r} holds an unfinished packing of other text (document "
                f"{entry.done.documents:,} or one of those before it in chunk {entry.done.chunks} "
                "was changed); give the text as it was, another folder, or --overwrite"
            )


def _append(
    folder: Path,
    chunks: Iterator[EncodedChunk],
    done: PackProgress,
    tokenizer: Tokenizer,
    report: Callable[[PackProgress], None],
) -> PackProgress:
    itemsize = ids_dtype(tokenizer.vocab_size).itemsize
    loss = TextLoss()
    with (
        (folder / TOKENS).open("ab") as tokens,
        (folder / DOCUMENTS).open("ab") as documents,
        (folder / JOURNAL).open("ab") as journal,
    ):
        for chunk in chunks:
            ends = (np.array(chunk.ends, dtype="<u8") + np.uint64(done.tokens)).tobytes()
            tokens.write(chunk.ids)
            documents.write(ends)
            done = PackProgress(
                done.chunks + 1,
                done.tokens + len(chunk.ids) // itemsize,
                done.documents + len(chunk.ends),
                done.text_bytes + chunk.text_bytes,
            )
            # The journal must not record a chunk before its ids are on disk.
            for file in (tokens, documents):
                sync(file)
            journal.write(journal_line(done, chunk.ids, ends, chunk.text_digest).encode())
            sync(journal)
            loss.add(chunk.loss)
            report(done)
    loss.warn(str(folder))
    return done


def finish_packing(
    folder: Path, settings: dict[str, Any], done: PackProgress, tokenizer: Tokenizer
) -> None:
    """Write the hashes, then the manifest, which marks the folder as complete."""
    if done.documents == 0:
        raise ConfigError("there is no text to pack; every source that was named is empty")
    with (folder / TOKENS).open("rb") as file:
        hashes = b"".join(
            hashlib.sha256(block).digest() for block in iter(lambda: file.read(BLOCK_BYTES), b"")
        )
        size = file.tell()
    if size != done.tokens * ids_dtype(tokenizer.vocab_size).itemsize:
        raise CorruptError(
            f"{folder / TOKENS} has {size} bytes, and {done.tokens} ids were packed; "
            "pack the text again"
        )
    with (folder / HASHES).open("wb") as hashes_file:
        hashes_file.write(hashes)
        sync(hashes_file)
    manifest = {
        "format": FORMAT,
        "dtype": ids_dtype(tokenizer.vocab_size).str,
        "tokens": done.tokens,
        "documents": done.documents,
        "text_bytes": done.text_bytes,
        "vocab_size": tokenizer.vocab_size,
        "end": tokenizer.end,
        "tokenizer": tokenizer.identity,
        "sources": settings["sources"],
        "hashes": hashlib.sha256(hashes).hexdigest(),
        "documents_sha256": hashlib.sha256((folder / DOCUMENTS).read_bytes()).hexdigest(),
    }
    text = json.dumps(manifest | {"digest": manifest_digest(manifest)}, indent=1)
    with (folder / UNFINISHED_MANIFEST).open("w", encoding="utf-8") as unfinished:
        unfinished.write(text)
        sync(unfinished)
    (folder / UNFINISHED_MANIFEST).rename(folder / MANIFEST)
    (folder / JOURNAL).unlink(missing_ok=True)
