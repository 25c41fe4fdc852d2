"""Convert text to token ids and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.tokens import Ids


class Tokenizer(Protocol):
    """The tokenizer interface of training and generation."""

    vocab_size: int
    end: int  # the end-of-document id
    identity: str  # equal only for equal ids: a name, and the digest of the tokenizer's content

    def encode(self, text: bytes) -> Ids:
        """Return the ids of UTF-8 text, without begin or end ids."""
        ...

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of ids. Invalid UTF-8 becomes a replacement character.

        Ids that have no token, such as padded ones, have no text. Special tokens have none, unless
        `special` asks for the text of those that text in a document becomes.
        """
        ...

    def bytes_in(self, ids: Ids) -> int:
        """Return the number of text bytes that the ids represent."""
        ...


class BytesTokenizer:
    """Maps each byte to its value. Id 256 ends a document and has no text."""

    vocab_size = 257
    end = 256
    identity = "bytes"

    def encode(self, text: bytes) -> Ids:
        """Return the ids of UTF-8 text."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of ids. No text becomes a special token."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def bytes_in(self, ids: Ids) -> int:
        """Return the number of ids that are bytes."""
        return int((ids < 256).sum())


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Build the configured tokenizer: bytes, tiktoken, or Hugging Face's from a path.

    Raises ConfigError.
    """
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
