"""Read MDS, the shard format of mosaicml-streaming. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tokenyard import ConfigError
from tokenyard_train.data.schema import Source
from tokenyard_train.data.sources.mds_index import read_index, warn_unlisted
from tokenyard_train.data.sources.mds_shard import ShardReader, Spans
from tokenyard_train.data.sources.mds_tokens import TokensFormat, WideIds, tokens_format
from tokenyard_train.data.sources.text import check_size, document_text
from tokenyard_train.data.tokens import Ids, check_ids, ids_dtype

log = logging.getLogger("tokenyard")

_TOKENS = "tokens"  # the column of ids


def mds_documents(folder: Path, text_key: str, key: str) -> Iterator[bytes | None]:
    """Yield the texts of a column. Each shard is verified against its hashes when it is opened.

    Raises ConfigError if the folder or the column is missing, or if the column is not text.
    """
    shards = read_index(folder, key)
    warn_unlisted(folder, shards)
    for shard in shards:
        reader = ShardReader(folder, shard, key)
        encoding = reader.encoding(text_key)
        if encoding not in ("str", "bytes"):
            raise ConfigError(
                f"{key}: column {text_key!r} of {folder} is {encoding}; text is str or bytes"
            )
        reader.check_hashes()
        spans = reader.spans(text_key)
        for i, (start, size) in enumerate(zip(spans.starts.tolist(), spans.sizes.tolist()), 1):
            location = f"{key}: {reader.path} row {i}"
            check_size(size, location)
            yield document_text(bytes(reader.value(start, size)), text_key, location)


class MdsTokens:
    """The `tokens` column of MDS shards as one stream of ids.

    All samples must have the same length, so that a position locates its sample by arithmetic.
    `encoding_type` is the dtype of ids in a column of bytes. The hashes and the ids of a shard are
    checked when it is first read, and those of the first shard at once. Raises ConfigError if
    lengths differ, if ids are outside the vocabulary, or if the column is not made of integers;
    CorruptError for a damaged shard.
    """

    def __init__(self, folder: Path, vocab_size: int, key: str, encoding_type: str = "int64"):
        shards = read_index(folder, key)
        warn_unlisted(folder, shards)
        self._key = key
        self._vocab_size = vocab_size
        self._dtype = ids_dtype(vocab_size)
        self._readers = [ShardReader(folder, shard, key) for shard in shards]
        self._spans: list[Spans] = []
        self._formats: list[TokensFormat] = []
        for reader in self._readers:
            form = tokens_format(reader.encoding("tokens"), encoding_type, key)
            self._formats.append(form)
            self._spans.append(reader.spans("tokens"))
        self.length = self._common_length()
        self._warn_if_narrow()
        self._firsts = np.cumsum([0, *(shard.samples for shard in shards)])
        self._checked = [False] * len(shards)
        self._check(0)

    def __len__(self) -> int:
        """Return the number of ids."""
        return int(self._firsts[-1]) * self.length

    def __getitem__(self, span: slice) -> Ids:
        """Return the ids of a slice."""
        start, stop, step = span.indices(len(self))
        if stop <= start:
            return np.empty(0, self._dtype)
        first = start // self.length
        last = (stop - 1) // self.length
        ids = np.concatenate([self._sample(i) for i in range(first, last + 1)])
        return ids[start - first * self.length : stop - first * self.length : step]

    def identity(self) -> str:
        """Return a digest of each shard's hashes, or else of its first and last bytes."""
        digest = hashlib.sha256()
        for reader, form in zip(self._readers, self._formats):
            digest.update(f"{reader.digest()} {form}\n".encode())
        return digest.hexdigest()

    def _sample(self, index: int) -> Ids:
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        self._check(shard)
        return self._stored(shard, index - int(self._firsts[shard])).astype(self._dtype)

    def _stored(self, shard: int, row: int) -> Ids:
        """Return a sample's ids in their stored dtype."""
        spans = self._spans[shard]
        value = self._readers[shard].value(int(spans.starts[row]), int(spans.sizes[row]))
        return self._formats[shard].ids(value, self._readers[shard].path)

    def _common_length(self) -> int:
        """Return the ids of each sample. Raises ConfigError if samples have several lengths."""
        length = None
        for reader, spans, form in zip(self._readers, self._spans, self._formats):
            sizes = np.unique(spans.sizes)
            lengths = {form.length(int(size), reader.path) for size in sizes[:2]}
            length = length or min(lengths)
            if lengths != {length}:
                raise ConfigError(
                    f"{self._key}: {reader.path} holds samples of several lengths "
                    f"({length} and {max(lengths)} ids); pack the text instead"
                )
        assert length is not None  # an index without samples is refused
        return length

    def _warn_if_narrow(self) -> None:
        """Log a warning if ids of bytes are read in a dtype that cannot hold the vocabulary.

        It is no error: a tokenizer may have got tokens since.
        """
        for reader, form in zip(self._readers, self._formats):
            most = np.iinfo(form.dtype).max
            if reader.encoding(_TOKENS) == "bytes" and most < self._vocab_size - 1:
                log.warning(
                    "%s: token_encoding_type is %s, which holds ids up to %d, and the tokenizer "
                    "has %d ids; if the ids were written wider, they are read wrong: samples of "
                    "%d ids each are read",
                    self._key,
                    form.dtype.name,
                    most,
                    self._vocab_size,
                    self.length,
                )
                return

    def _check(self, shard: int) -> None:
        """Check a shard's hashes and ids, once. Raises CorruptError or ConfigError."""
        if self._checked[shard]:
            return
        reader = self._readers[shard]
        reader.check_hashes()
        of_bytes = reader.encoding("tokens") == "bytes"
        hint = " or its token_encoding_type" if of_bytes else ""
        wide = WideIds(self._vocab_size)
        for row in range(reader.shard.samples):
            ids = self._stored(shard, row)
            check_ids(ids, self._vocab_size, f"{self._key}: sample {row} of {reader.path}", hint)
            wide.add(ids)
        if of_bytes and wide:
            raise ConfigError(
                f"{self._key}: every second id of {reader.path} is 0 as {ids.dtype.name}, so it "
                "holds wider ids; give their token_encoding_type, such as int64"
            )
        self._checked[shard] = True


def reads_tokens(source: Source, folder: Path, key: str) -> bool:
    """Return whether to read ids (LLM Foundry's --concat_tokens) instead of the text of shards.

    Raises ConfigError if the shards hold both, and the source does not say which by `text_key`.
    """
    columns = read_index(folder, key)[0].column_names
    text_key = source.text_key
    if _TOKENS not in columns or text_key == _TOKENS:
        return _TOKENS in columns
    if text_key not in columns:
        return text_key == Source.model_fields["text_key"].default
    if "text_key" not in source.model_fields_set:
        raise ConfigError(
            f"{key} {str(folder)!r} has the columns {text_key!r} and {_TOKENS!r}; "
            f"say text_key: {text_key} to read text, or text_key: {_TOKENS} to read ids"
        )
    return False
