"""Tokenize documents in chunks, in order, with one or more worker processes."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import cycle
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from tokenyard import TokenyardError
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.text_loss import LossCounter, TextLoss
from tokenyard_train.data.tokenizer import build_tokenizer
from tokenyard_train.data.tokens import ids_dtype


class EncodedChunk(NamedTuple):
    """The token ids of a chunk of documents."""

    ids: bytes  # each document's ids followed by the end id
    ends: list[int]  # position after each document's end id, from the start of the chunk
    text_bytes: int
    text_digest: str  # of `digest_text`
    loss: TextLoss


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


def digest_text(documents: Iterable[bytes]) -> str:
    """Return the SHA-256 of documents, each preceded by its length."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8))
        digest.update(document)
    return digest.hexdigest()


def encode_chunks(
    chunks: Iterator[list[bytes]], config: TokenizerConfig, workers: int
) -> Iterator[EncodedChunk]:
    """Tokenize chunks in order, with `workers` processes.

    About 2 * workers chunks are in memory at a time.
    """
    if workers == 1:
        counter = LossCounter(build_tokenizer(config))
        yield from (_encode(counter, chunk) for chunk in chunks)
        return
    try:
        yield from _encode_in_processes(chunks, config, workers)
    except _WorkerDiedError:
        raise TokenyardError(
            "a process of --workers was killed, perhaps for lack of memory; what is packed so far "
            f"is kept: run the command again with --workers {max(1, workers // 2)} to resume"
        ) from None


class _WorkerDiedError(Exception):
    """A worker process was killed."""


class _Worker:
    """A process that tokenizes chunks in order.

    It has a pipe of its own. A process that is killed while it writes to a pipe of several, as that
    of a ProcessPoolExecutor is, leaves the others and the reader waiting forever.
    """

    def __init__(self, config: TokenizerConfig):
        context = get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, config), daemon=True)
        self.process.start()
        other.close()  # so that `receive` sees the end of the process

    def send(self, chunk: list[bytes]) -> None:
        """Give the process another chunk. If it has ended, `receive` says why."""
        with suppress(OSError):
            self.connection.send(chunk)

    def receive(self) -> EncodedChunk:
        """Wait for the next encoded chunk. Raises the error of the process, if it has one."""
        try:
            result = self.connection.recv()
        except (EOFError, OSError):
            raise _WorkerDiedError from None
        if isinstance(result, Exception):
            raise result
        encoded: EncodedChunk = result
        return encoded

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _encode_in_processes(
    chunks: Iterator[list[bytes]], config: TokenizerConfig, workers: int
) -> Iterator[EncodedChunk]:
    """Give the chunks to the processes in turn, two each at a time, and take them in turn."""
    with ExitStack() as running:
        processes: list[_Worker] = []
        for _ in range(workers):
            processes.append(_Worker(config))
            running.callback(processes[-1].close)
        turns = cycle(processes)
        pending: deque[_Worker] = deque()
        for chunk in chunks:
            process = next(turns)
            process.send(chunk)
            pending.append(process)
            if len(pending) == 2 * workers:
                yield pending.popleft().receive()
        while pending:
            yield pending.popleft().receive()


def _serve(connection: Connection, config: TokenizerConfig) -> None:
    """Encode what comes through a connection, in a worker process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends this
    chunks: SimpleQueue[list[bytes]] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, chunks), daemon=True).start()
    try:
        counter = LossCounter(build_tokenizer(config))
        while True:
            connection.send(_encode(counter, chunks.get()))
    except Exception as error:
        connection.send(error)


def _receive(connection: Connection, chunks: SimpleQueue[list[bytes]]) -> None:
    """Take chunks at once, so that the parent never waits to send one; end with the parent."""
    while True:
        try:
            chunks.put(connection.recv())
        except BaseException:  # the end of the parent, or too little memory for a chunk
            os._exit(1)


def _encode(counter: LossCounter, documents: list[bytes]) -> EncodedChunk:
    dtype = ids_dtype(counter.tokenizer.vocab_size)
    end = np.array([counter.tokenizer.end], dtype=dtype)
    encoded = [counter.encode(document).astype(dtype, copy=False) for document in documents]
    ids = b"".join(part.data for document in encoded for part in (document, end))
    ends = np.cumsum([len(document) + 1 for document in encoded]).tolist()
    text_bytes = sum(map(len, documents))
    return EncodedChunk(ids, ends, text_bytes, digest_text(documents), counter.take())
