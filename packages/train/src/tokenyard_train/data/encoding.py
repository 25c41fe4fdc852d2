"""Tokenize documents in chunks, in order, with one or more worker processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import NamedTuple

import numpy as np

from tokenyard import TokenyardError
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.tokenizer import Tokenizer, build_tokenizer
from tokenyard_train.data.tokens import ids_dtype


class EncodedChunk(NamedTuple):
    """The token ids of a chunk of documents."""

    ids: bytes  # each document's ids followed by the end id
    ends: list[int]  # position after each document's end id, from the start of the chunk
    text_bytes: int


def split_chunks(documents: Iterable[bytes], min_bytes: int) -> Iterator[list[bytes]]:
    """Group documents into lists of at least `min_bytes` of text; the last may be smaller."""
    chunk: list[bytes] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= min_bytes:
            yield chunk
            chunk = []
            size = 0
    if chunk:
        yield chunk


def encode_chunks(
    chunks: Iterator[list[bytes]], config: TokenizerConfig, workers: int, skip: int
) -> Iterator[EncodedChunk]:
    """Tokenize all chunks but the first `skip`, in order, with `workers` processes.

    About 2 * workers chunks are in memory at a time.
    """
    remaining = islice(chunks, skip, None)
    if workers == 1:
        tokenizer = build_tokenizer(config)
        yield from (_encode(tokenizer, chunk) for chunk in remaining)
        return
    try:
        yield from _encode_in_pool(remaining, config, workers)
    except BrokenProcessPool:
        raise TokenyardError(
            "a process of --workers was killed, perhaps for lack of memory; what is packed so far "
            f"is kept: run the same command again, with fewer --workers than {workers}"
        ) from None


def _encode_in_pool(
    chunks: Iterator[list[bytes]], config: TokenizerConfig, workers: int
) -> Iterator[EncodedChunk]:
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (config,)) as pool:
        pending: list[Future[EncodedChunk]] = []
        for chunk in chunks:
            pending.append(pool.submit(_encode_in_worker, chunk))
            if len(pending) > 2 * workers:
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()


# A pool passes no state to its tasks, so a worker process keeps its tokenizer in a global.
_worker_tokenizer: list[Tokenizer] = []


def _start_worker(config: TokenizerConfig) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer.append(build_tokenizer(config))


def _end_with_parent() -> None:
    """End this process when its parent has ended, also if the parent was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(documents: list[bytes]) -> EncodedChunk:
    return _encode(_worker_tokenizer[0], documents)


def _encode(tokenizer: Tokenizer, documents: list[bytes]) -> EncodedChunk:
    dtype = ids_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.end], dtype=dtype)
    encoded = [tokenizer.encode(document).astype(dtype, copy=False) for document in documents]
    ids = b"".join(part.data for document in encoded for part in (document, end))
    ends = np.cumsum([len(document) + 1 for document in encoded]).tolist()
    return EncodedChunk(ids, ends, sum(map(len, documents)))
