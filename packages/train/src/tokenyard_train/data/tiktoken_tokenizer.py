"""Tokenize with a tiktoken encoding, by name or from a file of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenyard import ConfigError
from tokenyard_train.data.schema import TiktokenKwargs
from tokenyard_train.data.tokens import Ids, ids_dtype
from tokenyard_train.optional import require

_MOST_UNUSED_IDS = 1 << 16  # ids without a token that any vocabulary may have
_END = "<|endoftext|>"  # ends a document


class TiktokenTokenizer:
    """A tiktoken encoding. Raises ConfigError if it is unavailable or has no end-of-document id."""

    def __init__(self, kwargs: TiktokenKwargs | None):
        tiktoken = require("tiktoken", "tokenizer.name 'tiktoken'", "tokenyard-train[data]")
        kwargs = kwargs or TiktokenKwargs()
        self._encoding = _from_file(tiktoken, kwargs) if kwargs.file else _by_name(tiktoken, kwargs)
        self.pattern: str = self._encoding._pat_str
        self.ranks: dict[bytes, int] = self._encoding._mergeable_ranks
        self.special_tokens: dict[str, int] = self._encoding._special_tokens
        if _END not in self.special_tokens:
            raise ConfigError(
                f"tokenizer.kwargs.special_tokens must hold {_END!r}, the end of a document, "
                "and its id"
            )
        self.end: int = self.special_tokens[_END]
        self.vocab_size: int = self._encoding.max_token_value + 1
        self.identity = f"tiktoken {_digest(self._encoding)}"
        self._dtype = ids_dtype(self.vocab_size)
        self._text_ids = frozenset(self.ranks.values())
        self._sizes = _byte_sizes(self._encoding, self.vocab_size)

    def encode(self, text: bytes) -> Ids:
        """Return the ids of UTF-8 text. The text of a special token is encoded as plain text."""
        return np.array(self._encoding.encode_ordinary(text.decode("utf-8")), dtype=self._dtype)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of ids, without special tokens and ids that have no token.

        No text becomes a special token.
        """
        return str(
            self._encoding.decode([int(i) for i in ids if i in self._text_ids], errors="replace")
        )

    def bytes_in(self, ids: Ids) -> int:
        """Return the number of text bytes that the ids represent."""
        return int(self._sizes[ids].sum())


def _from_file(tiktoken: Any, kwargs: TiktokenKwargs) -> Any:
    from tiktoken.load import load_tiktoken_bpe

    path = Path(str(kwargs.file))
    if not path.is_file():
        problem = f"{str(path)!r} does not exist"
    elif kwargs.pattern is None:
        problem = "needs tokenizer.kwargs.pattern beside it"
    else:
        problem = ""
    if problem:
        raise ConfigError(
            f"tokenizer.kwargs.file: {problem}; "
            "give a file of ranks, and the pattern that splits text"
        )
    try:
        ranks = load_tiktoken_bpe(str(path))
        _check_ranks(ranks, path)
        _check_special_ids(kwargs.special_tokens, ranks)
        return tiktoken.Encoding(
            path.name,
            pat_str=kwargs.pattern,
            mergeable_ranks=ranks,
            special_tokens=kwargs.special_tokens,
        )
    except ConfigError:
        raise
    except Exception as error:  # the library raises errors of many types, panics included
        raise ConfigError(
            f"tokenizer.kwargs.file: {path} is not a file of ranks, or the pattern is no regular "
            f"expression: {error}"
        ) from None


def _check_ranks(ranks: dict[bytes, int], path: Path) -> None:
    """Raise ConfigError for an id of two tokens, and for bytes without a token.

    tiktoken panics at the first, and at the first text with such a byte.
    """
    missing = [i for i in range(256) if bytes([i]) not in ranks]
    problem = f"no token for {len(missing)} of the 256 bytes" if missing else ""
    if len(set(ranks.values())) != len(ranks):
        problem = "two tokens of one id"
    if problem:
        raise ConfigError(f"tokenizer.kwargs.file: {path} has {problem}; copy the file again")


def _check_special_ids(special: dict[str, int], ranks: dict[bytes, int]) -> None:
    """Raise ConfigError for an id that is negative, taken, or far beyond the vocabulary."""
    used = set(ranks.values())
    bound = 2 * (len(used) + len(special)) + _MOST_UNUSED_IDS
    for token, i in special.items():
        if not 0 <= i < bound or i in used:
            raise ConfigError(
                f"tokenizer.kwargs.special_tokens gives {token!r} the id {i}; the file has "
                f"{len(used)} ranks, so the next free id is {max(used, default=-1) + 1}"
            )


def _by_name(tiktoken: Any, kwargs: TiktokenKwargs) -> Any:
    name = kwargs.encoding_name or kwargs.model_name
    if name is None:
        raise ConfigError(
            "tokenizer.kwargs is missing; give encoding_name, model_name, or file and pattern"
        )
    get = tiktoken.get_encoding if kwargs.encoding_name else tiktoken.encoding_for_model
    try:
        return get(name)
    except (KeyError, ValueError):
        known = ", ".join(tiktoken.list_encoding_names())
        raise ConfigError(
            f"tokenizer.kwargs names {name!r}, which is unknown to tiktoken; encodings: {known}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"tokenizer.kwargs names {name!r}, which tiktoken downloads, and that failed "
            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has it, or give "
            "file and pattern"
        ) from None


def _digest(encoding: Any) -> str:
    digest = hashlib.sha256(
        f"{encoding._pat_str}{sorted(encoding._special_tokens.items())}".encode()
    )
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        digest.update(len(token).to_bytes(4) + token + rank.to_bytes(4))
    return digest.hexdigest()


def _byte_sizes(encoding: Any, vocab_size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    sizes = np.zeros(vocab_size, dtype=np.int64)
    for token, rank in encoding._mergeable_ranks.items():
        sizes[rank] = len(token)
    return sizes
