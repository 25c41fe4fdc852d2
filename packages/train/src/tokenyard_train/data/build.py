"""The data that a config names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tokenyard import ConfigError
from tokenyard_train.data.corpus import python_stdlib
from tokenyard_train.data.mixture import Mixture
from tokenyard_train.data.samples import HeldOut, Samples
from tokenyard_train.data.schema import DataSettings, PythonStdlib, Source, Text
from tokenyard_train.data.sources import mds_folder, read_documents
from tokenyard_train.data.sources.mds import MdsTokens, has_tokens
from tokenyard_train.data.tokenizer import Tokenizer, build_tokenizer
from tokenyard_train.data.tokens import Ids, TokenFile, Tokens, ids_dtype

_IN_MEMORY = 1 << 30  # bytes of text that are tokenized at the start of a run


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    tokenizer: Tokenizer
    train: Samples | Mixture
    held_out: HeldOut | None


def build_data(settings: DataSettings) -> Data:
    """Open, or read and tokenize, the text that a config names. Raises ConfigError for text missing or too short."""
    tokenizer = build_tokenizer(settings.tokenizer)
    train = _train(settings, tokenizer)
    if settings.eval_loader is None:
        return Data(tokenizer, train, None)
    held_out = _tokens(settings.eval_loader, tokenizer, "eval_loader")
    scored = HeldOut(
        held_out, settings.max_seq_len, settings.eval_batch_size, settings.eval_batches
    )
    return Data(tokenizer, train, scored)


def _train(settings: DataSettings, tokenizer: Tokenizer) -> Samples | Mixture:
    loader, length, seed = settings.train_loader, settings.max_seq_len, settings.seed
    shuffle = loader.dataset.shuffle
    if isinstance(loader, PythonStdlib) or loader.dataset.streams is None:
        return Samples(_tokens(loader, tokenizer, "train_loader"), length, seed, shuffle)
    key = "train_loader.dataset.streams"
    streams = {
        name: Samples(_opened(stream, tokenizer, f"{key}.{name}"), length, seed, shuffle)
        for name, stream in loader.dataset.streams.items()
    }
    weights = {name: stream.proportion for name, stream in loader.dataset.streams.items()}
    return Mixture(streams, weights, seed)


def _tokens(loader: PythonStdlib | Text, tokenizer: Tokenizer, where: str) -> Tokens:
    if isinstance(loader, PythonStdlib):
        try:
            documents = python_stdlib(held_out=where == "eval_loader")
        except ConfigError as error:
            raise ConfigError(f"{where}.{error}") from None
        return tokenize((document.text for document in documents), tokenizer, where)
    if loader.dataset.streams is not None:
        raise ConfigError(
            f"{where}.dataset.streams mixes training text; score one source at a time"
        )
    return _opened(loader.dataset, tokenizer, f"{where}.dataset")


def _opened(source: Source, tokenizer: Tokenizer, key: str) -> Tokens:
    if source.packed is not None:
        return _packed(source.packed, tokenizer, key)
    if source.local is not None and has_tokens(mds_folder(source), f"{key}.local"):
        return MdsTokens(mds_folder(source), tokenizer.vocab_size, f"{key}.local")
    return tokenize(read_documents(source, key), tokenizer, key)


def _packed(folder: str, tokenizer: Tokenizer, key: str) -> TokenFile:
    try:
        tokens = TokenFile(folder)
    except ConfigError as error:
        raise ConfigError(f"{key}.packed {error}") from None
    if tokens.manifest["tokenizer"] != tokenizer.identity:
        raise ConfigError(
            f"{key}.packed {folder!r} was packed by the tokenizer {tokens.manifest['tokenizer']}, and the config's is "
            f"{tokenizer.identity}; name that one, or pack the text again"
        )
    return tokens


def tokenize(documents: Iterable[bytes], tokenizer: Tokenizer, key: str) -> Ids:
    """Return the ids of documents, each followed by the end id. Raises ConfigError for none, or for too much text."""
    dtype = ids_dtype(tokenizer.vocab_size)
    parts: list[Ids] = []
    end = np.array([tokenizer.end], dtype=dtype)
    size = 0
    for document in documents:
        size += len(document)
        if size > _IN_MEMORY:
            raise ConfigError(
                f"{key} has more than {_IN_MEMORY >> 20} MiB of text; run tokenyard data pack on it, and name the "
                "folder by dataset.packed"
            )
        parts += [tokenizer.encode(document).astype(dtype, copy=False), end]
    if not parts:
        raise ConfigError(f"{key}: there is no text; every file that it names is empty")
    return np.concatenate(parts)
