"""Tokenize with a Hugging Face tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenyard import ConfigError
from tokenyard_train.data.json_text import parse_json
from tokenyard_train.data.tokens import Ids, ids_dtype
from tokenyard_train.optional import require

_MOST_UNUSED_IDS = 1 << 16  # ids without a token that any vocabulary may have


class HfTokenizer:
    """A tokenizer.json, given by its path or its folder.

    The end-of-document token is `eos_token`, or else the eos_token of the tokenizer_config.json
    beside the file. Truncation, padding and dropout that the file names are off. Raises ConfigError
    if the file is unusable or no such token exists. The text of a special token in a document
    becomes its id, as in transformers, unless tokenizer_config.json has `split_special_tokens`.
    """

    def __init__(self, name: str, eos_token: str | None):
        path = tokenizer_file(Path(name))
        tokenizers = require("tokenizers", f"tokenizer.name {name!r}", "tokenyard-train[data]")
        try:
            content = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_str(without_training_state(content))
        except Exception as error:  # the library raises bare Exceptions
            raise ConfigError(
                f"tokenizer.name {name!r}: {path} is not a tokenizer: {error}"
            ) from None
        options = read_options(path)
        eos = eos_token or _configured_eos(path, options)
        splits_special = options.get("split_special_tokens") is True
        self._tokenizer.encode_special_tokens = splits_special
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.end = self._end_id(name, eos)
        self.identity = f"tokenizer.json {hashlib.sha256(content).hexdigest()} {eos}"
        self.identity += " split_special_tokens" * splits_special
        self._special = {
            i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special
        }
        self._dtype = ids_dtype(self.vocab_size)
        self._sizes = self._byte_sizes()

    def encode(self, text: bytes) -> Ids:
        """Return the ids of UTF-8 text, without special tokens."""
        (encoding,) = self._tokenizer.encode_batch_fast(
            [text.decode("utf-8")], add_special_tokens=False
        )
        return np.array(encoding.ids, dtype=self._dtype)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of ids, of `special` tokens if asked, and of ids that have a token."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=not special))

    def bytes_in(self, ids: Ids) -> int:
        """Return the number of text bytes that the ids represent.

        Exact for a byte-level tokenizer. For others, the size of the ids' decoded text.
        """
        if self._sizes is None:
            return len(self.decode(ids.tolist()).encode())
        return int(self._sizes[ids].sum())

    def _end_id(self, name: str, eos: str | None) -> int:
        if eos is None:
            raise ConfigError(
                f"tokenizer.name {name!r} must say how a document ends, and has no token for it; "
                "give tokenizer.eos_token"
            )
        end = self._tokenizer.token_to_id(eos)
        if end is None:
            added = self._tokenizer.get_added_tokens_decoder().values()
            known = ", ".join([repr(token.content) for token in added][:5]) or "none"
            raise ConfigError(
                f"tokenizer.name {name!r} has no token {eos!r}, which eos_token names; "
                f"give one that it has as tokenizer.eos_token (special tokens: {known})"
            )
        return int(end)

    def _byte_sizes(self) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        """Return the text bytes of each id [vocab_size], or None if tokens are not byte-level.

        In a byte-level tokenizer, each character of a token is one byte of text. Special tokens
        have no text, and other added tokens are stored as plain text.
        """
        decoder = json.loads(self._tokenizer.to_str()).get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            return None
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        added = self._tokenizer.get_added_tokens_decoder()
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in self._special:
                continue
            sizes[i] = len(token.encode()) if i in added else len(token)
        return sizes


def without_training_state(content: bytes) -> str:
    """Return a tokenizer.json without truncation, padding and dropout.

    A tool that trained a model leaves them in the file. Raises ValueError if the file is not a
    tokenizer, or if an id is so large that the library would run out of memory.
    """
    tokenizer = parse_json(content)
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("model"), dict):
        raise ValueError("it is no JSON object with a model")
    ids = list(_ids(tokenizer))
    bound = 2 * len(ids) + _MOST_UNUSED_IDS
    if wrong := next((i for i in ids if not isinstance(i, int) or not 0 <= i < bound), None):
        raise ValueError(f"it has {len(ids)} tokens, and one has id {wrong}")
    if "dropout" in tokenizer["model"]:
        tokenizer["model"]["dropout"] = None
    return json.dumps(tokenizer | {"truncation": None, "padding": None})


def _ids(tokenizer: dict[str, Any]) -> Iterator[Any]:
    """Yield the ids that a parsed tokenizer.json gives. A list of tokens gives positions."""
    vocabulary = tokenizer["model"].get("vocab")
    if isinstance(vocabulary, dict):
        yield from vocabulary.values()
    elif isinstance(vocabulary, list):
        yield from range(len(vocabulary))
    for added in tokenizer.get("added_tokens") or []:
        yield added.get("id") if isinstance(added, dict) else None


def tokenizer_file(path: Path) -> Path:
    """Return the tokenizer.json of a path, which names it or its folder. Raises ConfigError."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        what = ", a folder without a tokenizer.json" if path.is_dir() else ""
        if not path.is_absolute():
            what += f" (looked for {file.absolute()})"
        raise ConfigError(
            f"tokenizer.name is {str(path)!r}{what}; give bytes, tiktoken, the path of a "
            "tokenizer.json or its folder, or a name of the Hugging Face hub after hf download "
            "(to generate and routing as --tokenizer)"
        )
    return file


def read_options(path: Path) -> dict[str, Any]:
    """Return the content of the tokenizer_config.json beside a file. Raises ConfigError."""
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return {}
    try:
        options = parse_json(config.read_bytes())
    except (OSError, ValueError):
        options = None
    if not isinstance(options, dict):
        raise ConfigError(f"{config} is not a JSON object; fix it, or remove it")
    return options


def _configured_eos(path: Path, options: dict[str, Any]) -> str | None:
    eos = options.get("eos_token")
    token = eos.get("content") if isinstance(eos, dict) else eos
    if token is not None and not isinstance(token, str):
        config = path.with_name("tokenizer_config.json")
        raise ConfigError(
            f"{config} has the eos_token {token!r}, which is no text; fix it, or give "
            "tokenizer.eos_token"
        )
    return token
