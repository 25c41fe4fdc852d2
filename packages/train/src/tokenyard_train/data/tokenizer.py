"""From text to token ids and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from tokenyard_train.data.schema import Tokenizer as TokenizerConfig
from tokenyard_train.data.tokens import Ids


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer."""

    vocab_size: int
    end: int  # the id that ends a document
    identity: (
        str  # equal for two that give the same ids: a name, and the digest of what it was read from
    )

    def encode(self, text: bytes) -> Ids:
        """Return the ids of UTF-8 text, without any that begin or end it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; what is no valid UTF-8 becomes a replacement character."""
        ...

    def bytes_in(self, ids: Ids) -> int:
        """Return how many bytes of text the ids stand for."""
        ...


class BytesTokenizer:
    """Each byte is its value; 256 ends a document and stands for no text."""

    vocab_size = 257
    end = 256
    identity = "bytes"

    def encode(self, text: bytes) -> Ids:
        """Return the ids of UTF-8 text."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def bytes_in(self, ids: Ids) -> int:
        """Return how many of the ids are bytes."""
        return int((ids < 256).sum())


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer that a config names: bytes, tiktoken, or a path of Hugging Face's. Raises ConfigError."""
    return _BUILDERS.get(config.name, _from_path)(config)


def _bytes(config: TokenizerConfig) -> Tokenizer:
    return BytesTokenizer()


def _tiktoken(config: TokenizerConfig) -> Tokenizer:
    from tokenyard_train.data.tiktoken_tokenizer import TiktokenTokenizer

    return TiktokenTokenizer(config.kwargs)


def _from_path(config: TokenizerConfig) -> Tokenizer:
    from tokenyard_train.data.hf_tokenizer import HfTokenizer

    return HfTokenizer(config.name, config.eos_token)


_BUILDERS: dict[str, Callable[[TokenizerConfig], Tokenizer]] = {
    "bytes": _bytes,
    "tiktoken": _tiktoken,
}
