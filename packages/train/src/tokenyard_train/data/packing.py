"""`tokenyard data pack`: text into a folder that TokenFile reads; killed and run again, it goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenyard import ConfigError, TokenyardError
from tokenyard_train.data.encoding import Encoded, chunks, encoded
from tokenyard_train.data.schema import Tokenizer as TokenizerConfig
from tokenyard_train.data.tokenizer import Tokenizer, build_tokenizer
from tokenyard_train.data.tokens import (
    BLOCK_BYTES,
    DOCUMENTS,
    FORMAT,
    HASHES,
    MANIFEST,
    TOKENS,
    ids_dtype,
    manifest_digest,
)

JOURNAL = "journal.jsonl"
CHUNK_BYTES = 4 << 20  # of text; documents are never split


class Counts(NamedTuple):
    """How far a packing is."""

    chunks: int = 0
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0


def pack(
    folder: Path,
    documents: Callable[[], Iterable[bytes]],
    tokenizer: TokenizerConfig,
    sources: list[dict[str, Any]],
    workers: int,
    progress: Callable[[Counts], None],
) -> Counts:
    """Tokenize documents, which come in the same order each time, into a packed folder.

    The bytes that result do not depend on the number of workers, nor on how often the packing was killed: the text is
    cut in chunks by one rule, their ids are appended in order, and a journal says after which chunk a new run goes on.
    Raises ConfigError if another packing was begun in the folder, and TokenyardError if it cannot be written.
    """
    built = build_tokenizer(tokenizer)
    settings = {
        "format": FORMAT,
        "tokenizer": built.identity,
        "sources": sources,
        "chunk_bytes": CHUNK_BYTES,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = _begin(folder, settings, ids_dtype(built.vocab_size).itemsize)
        progress(done)
        text = chunks(documents(), CHUNK_BYTES)
        done = _append(
            folder, encoded(text, tokenizer, workers, done.chunks), done, built, progress
        )
        _finish(folder, settings, done, built)
    except OSError as error:
        raise TokenyardError(
            f"{folder} cannot be written: {error.strerror}; what is packed so far stays"
        ) from None
    return done


def _begin(folder: Path, settings: dict[str, Any], itemsize: int) -> Counts:
    """Start a journal, or take up the one that stands; cut the files back to what it vouches for."""
    journal = folder / JOURNAL
    if (folder / MANIFEST).exists():
        raise ConfigError(f"{str(folder)!r} is packed already; give another folder, or --overwrite")
    done = Counts()
    if journal.exists() and (lines := _whole_lines(journal)):
        if json.loads(lines[0]) != settings:
            raise ConfigError(
                f"{str(folder)!r} holds an unfinished packing of other text or by another tokenizer; "
                "give the same ones to go on, another folder, or --overwrite"
            )
        done = Counts(*json.loads(lines[-1])) if len(lines) > 1 else done
        journal.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    else:
        journal.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    for name, size in ((TOKENS, done.tokens * itemsize), (DOCUMENTS, done.documents * 8)):
        with (folder / name).open("ab") as file:
            file.truncate(size)
    return done


def _whole_lines(journal: Path) -> list[str]:
    return journal.read_text(encoding="utf-8").split("\n")[
        :-1
    ]  # what follows the last line end was not finished


def _append(
    folder: Path,
    parts: Iterator[Encoded],
    done: Counts,
    tokenizer: Tokenizer,
    progress: Callable[[Counts], None],
) -> Counts:
    itemsize = ids_dtype(tokenizer.vocab_size).itemsize
    with (
        (folder / TOKENS).open("ab") as tokens,
        (folder / DOCUMENTS).open("ab") as documents,
        (folder / JOURNAL).open("a", encoding="utf-8") as journal,
    ):
        for part in parts:
            tokens.write(part.ids)
            documents.write((np.array(part.ends, dtype="<u8") + np.uint64(done.tokens)).tobytes())
            done = Counts(
                done.chunks + 1,
                done.tokens + len(part.ids) // itemsize,
                done.documents + len(part.ends),
                done.text_bytes + part.text_bytes,
            )
            for file in (tokens, documents):
                _sync(file)
            journal.write(json.dumps(done) + "\n")
            _sync(journal)
            progress(done)
    return done


def _finish(folder: Path, settings: dict[str, Any], done: Counts, tokenizer: Tokenizer) -> None:
    if done.documents == 0:
        raise ConfigError("there is no text to pack; every source that was named is empty")
    with (folder / TOKENS).open("rb") as file:
        hashes = b"".join(
            hashlib.sha256(block).digest() for block in iter(lambda: file.read(BLOCK_BYTES), b"")
        )
    (folder / HASHES).write_bytes(hashes)
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
    unfinished = folder / (MANIFEST + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as written:
        written.write(text)
        _sync(written)
    unfinished.rename(folder / MANIFEST)
    (folder / JOURNAL).unlink()


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
