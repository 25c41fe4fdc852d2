"""From text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokenyard_train.config.schema import Tokenizer as TokenizerConfig

Ids = NDArray[np.uint16]


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer."""

    vocab_size: int
    end: int  # the id that ends a document

    def encode(self, text: bytes) -> Ids:
        """Return the ids of UTF-8 text."""
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
    """Return the tokenizer that a config names."""
    return {"bytes": BytesTokenizer}[config.name]()
