"""Tokenize documents in chunks, in order, with one or more worker processes."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from queue import SimpleQueue
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
        yield from _encode_in_processes(remaining, config, workers)
    except (EOFError, ConnectionError):
        raise TokenyardError(
            "a process of --workers was killed, perhaps for lack of memory; what is packed so far "
            f"is kept: run the same command again, with fewer --workers than {workers}"
        ) from None


def _encode_in_processes(
    chunks: Iterator[list[bytes]], config: TokenizerConfig, workers: int
) -> Iterator[EncodedChunk]:
    """Let one thread wait for each process. Raises EOFError if a process was killed."""
    idle: SimpleQueue[_Worker] = SimpleQueue()

    def encode(chunk: list[bytes]) -> EncodedChunk:
        worker = idle.get()
        try:
            return worker.encode(chunk)
        finally:
            idle.put(worker)

    with ExitStack() as stack:
        threads = ThreadPoolExecutor(workers)
        stack.callback(threads.shutdown, cancel_futures=True)
        for _ in range(workers):
            idle.put(stack.enter_context(closing(_Worker(config))))
        pending: deque[Future[EncodedChunk]] = deque()
        for chunk in chunks:
            pending.append(threads.submit(encode, chunk))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class _Worker:
    """A process that tokenizes chunks.

    Each process has its own pipe. Processes that share a queue, as in ``concurrent.futures``, hang
    for ever when one of them is killed while it writes.
    """

    def __init__(self, config: TokenizerConfig):
        context = get_context("spawn")
        self.connection, child = context.Pipe()
        self.process = context.Process(target=_serve, args=(child, config), daemon=True)
        self.process.start()
        child.close()  # so that the end of the process ends the pipe

    def encode(self, chunk: list[bytes]) -> EncodedChunk:
        """Return the encoded chunk. Raises EOFError if the process was killed, or its error."""
        self.connection.send(chunk)
        result: EncodedChunk | Exception = self.connection.recv()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """End the process. A thread that waits in `encode` then gets an EOFError."""
        self.process.terminate()
        self.process.join()


def _serve(connection: Connection, config: TokenizerConfig) -> None:
    """Encode chunks from the pipe until it ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = build_tokenizer(config)
    with suppress(EOFError, ConnectionError):
        while True:
            chunk = connection.recv()
            try:
                result: EncodedChunk | Exception = _encode(tokenizer, chunk)
            except Exception as error:
                result = error
            connection.send(result)


def _end_with_parent() -> None:
    """End this process when its parent has ended, also if the parent was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(tokenizer: Tokenizer, documents: list[bytes]) -> EncodedChunk:
    dtype = ids_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.end], dtype=dtype)
    encoded = [tokenizer.encode(document).astype(dtype, copy=False) for document in documents]
    ids = b"".join(part.data for document in encoded for part in (document, end))
    ends = np.cumsum([len(document) + 1 for document in encoded]).tolist()
    return EncodedChunk(ids, ends, sum(map(len, documents)))
