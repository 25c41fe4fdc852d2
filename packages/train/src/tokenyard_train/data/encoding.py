"""Documents into chunks of token ids, in order, by any number of processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np

from tokenyard_train.data.schema import Tokenizer as TokenizerConfig
from tokenyard_train.data.tokenizer import Tokenizer, build_tokenizer
from tokenyard_train.data.tokens import ids_dtype


class Encoded(NamedTuple):
    """What a chunk of documents became."""

    ids: bytes  # each document's ids and the end id
    ends: list[int]  # where each document ends, in ids, from the start of the chunk
    text_bytes: int


def chunks(documents: Iterable[bytes], least: int) -> Iterator[list[bytes]]:
    """Cut documents into lists of at least so many bytes of text each, the last one excepted."""
    chunk: list[bytes] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= least:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encoded(
    work: Iterator[list[bytes]], config: TokenizerConfig, workers: int, skip: int
) -> Iterator[Encoded]:
    """Tokenize the chunks after the first `skip`, in order, by so many processes; few are in memory at a time."""
    for _ in zip(range(skip), work):
        pass
    if workers == 1:
        tokenizer = build_tokenizer(config)
        yield from (_encode(tokenizer, chunk) for chunk in work)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (config,)) as pool:
        waiting: list[Future[Encoded]] = []
        for chunk in work:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


_worker: list[Tokenizer] = []  # of a worker process, which has nothing else to keep it in


def _start_worker(config: TokenizerConfig) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.append(build_tokenizer(config))


def _work(documents: list[bytes]) -> Encoded:
    return _encode(_worker[0], documents)


def _encode(tokenizer: Tokenizer, documents: list[bytes]) -> Encoded:
    dtype = ids_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.end], dtype=dtype)
    parts = [
        part
        for document in documents
        for part in (tokenizer.encode(document).astype(dtype, copy=False), end)
    ]
    lengths = [len(parts[i]) + 1 for i in range(0, len(parts), 2)]
    return Encoded(
        np.concatenate(parts).tobytes(), np.cumsum(lengths).tolist(), sum(map(len, documents))
    )
