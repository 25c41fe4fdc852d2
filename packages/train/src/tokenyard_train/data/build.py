"""Build the data of a training config."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from tokenyard import ConfigError
from tokenyard.units import describe_bytes
from tokenyard_train.data.corpus import python_stdlib
from tokenyard_train.data.finetuning import PackedDocuments, PackedHeldOut, build_packed
from tokenyard_train.data.mixture import Mixture
from tokenyard_train.data.samples import HeldOut, Samples
from tokenyard_train.data.schema import (
    DataSettings,
    FinetuningDataset,
    FinetuningLoader,
    Loader,
    Source,
    StdlibDataset,
    StdlibLoader,
    TextDataset,
    TextLoader,
)
from tokenyard_train.data.sources import mds_folder, read_documents
from tokenyard_train.data.sources.mds import MdsTokens, reads_tokens
from tokenyard_train.data.text_loss import LossCounter
from tokenyard_train.data.tokenizer import Tokenizer, build_tokenizer
from tokenyard_train.data.tokens import Ids, TokenFile, Tokens, ids_dtype
from tokenyard_train.data.unused_keys import check_source, check_tokenizer, streams_of

log = logging.getLogger("tokenyard")

_SAME_TEXT = "%s has the same text as %s, so its score is of training text"
_IN_MEMORY = 1 << 30  # bytes of text that may be tokenized at start-up


@dataclass(frozen=True)
class Data:
    """The tokenizer, training samples and held-out windows of a run."""

    tokenizer: Tokenizer
    train: Samples | Mixture | PackedDocuments
    held_out: HeldOut | PackedHeldOut | None
    labelled: Mapping[str, HeldOut | PackedHeldOut] = field(default_factory=dict)  # eval_loaders

    def held_out_sets(self) -> dict[str, HeldOut | PackedHeldOut]:
        """Return the held-out sets by the kind of their records: eval, or eval/label."""
        first = {} if self.held_out is None else {"eval": self.held_out}
        return first | {f"eval/{label}": rows for label, rows in self.labelled.items()}

    def identity(self) -> dict[str, str]:
        """Return digests of what decides the training samples, by config key.

        The tokenizer and the ids of each stream: all ids of text that was tokenized at start-up,
        the recorded hashes of a packed folder, and those of MDS shards (without them, their sizes
        and first and last bytes). Of packed documents, the ids and which are supervised.
        """
        if isinstance(self.train, PackedDocuments):
            packed = {"train_loader.dataset": self.train.identity()}
            return {"tokenizer": self.tokenizer.identity} | packed
        streams = _streams(self.train)
        digests = {key: _identity(stream.tokens) for key, stream in streams.items()}
        return {"tokenizer": self.tokenizer.identity} | digests


def _streams(train: Samples | Mixture | PackedDocuments) -> dict[str, Samples]:
    """Return the streams of training text by config key; none of packed documents."""
    if isinstance(train, PackedDocuments):
        return {}
    if isinstance(train, Samples):
        return {"train_loader.dataset": train}
    prefix = "train_loader.dataset.streams"
    return {f"{prefix}.{name}": stream for name, stream in train.streams.items()}


def _identity(tokens: Tokens) -> str:
    if isinstance(tokens, TokenFile | MdsTokens):
        return tokens.identity()
    return hashlib.sha256(np.ascontiguousarray(tokens[:]).data).hexdigest()


def build_data(settings: DataSettings) -> Data:
    """Open packed text, or read and tokenize text. Raises ConfigError if it is missing or short."""
    _check_lengths(settings)
    check_tokenizer(settings.tokenizer)
    tokenizer = build_tokenizer(settings.tokenizer)
    train = _train_samples(settings, tokenizer)
    loader = settings.eval_loader
    held_out = None
    if loader is not None:
        held_out = _held_out(loader, settings, train, tokenizer, "eval_loader")
    labelled = {
        label: _held_out(loader, settings, train, tokenizer, f"eval_loaders.{label}")
        for label, loader in settings.eval_loaders.items()
    }
    return Data(tokenizer, train, held_out, labelled)


def _held_out(
    loader: Loader,
    settings: DataSettings,
    train: Samples | Mixture | PackedDocuments,
    tokenizer: Tokenizer,
    key: str,
) -> HeldOut | PackedHeldOut:
    limits = (settings.eval_batch_size, settings.eval_batches)
    if isinstance(loader, FinetuningLoader):
        rows = build_packed(loader.dataset, settings, tokenizer, f"{key}.dataset")
        if isinstance(train, PackedDocuments) and rows.identity() == train.identity():
            log.warning(_SAME_TEXT, f"{key}.dataset", "train_loader.dataset")
        return PackedHeldOut(rows, *limits)
    tokens = _loader_tokens(loader, tokenizer, key)
    for name, stream in _streams(train).items():
        if len(stream.tokens) == len(tokens) and _identity(stream.tokens) == _identity(tokens):
            log.warning(_SAME_TEXT, f"{key}.dataset", name)
    with _named(f"{key}.dataset"):
        return HeldOut(tokens, settings.max_seq_len, *limits)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Context: a ConfigError begins with a key."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _check_lengths(settings: DataSettings) -> None:
    """Raise ConfigError if a dataset's max_seq_len is not the config's."""
    sections: dict[str, Source | StdlibDataset | FinetuningDataset] = {
        f"{key}.dataset": loader.dataset for key, loader in settings.loaders().items()
    }
    for key, dataset in list(sections.items()):
        streams = dataset.streams if isinstance(dataset, TextDataset) else None
        sections |= {f"{key}.streams.{name}": stream for name, stream in (streams or {}).items()}
    for key, section in sections.items():
        if section.max_seq_len not in (None, settings.max_seq_len):
            raise ConfigError(
                f"{key}.max_seq_len is {section.max_seq_len}, and max_seq_len is "
                f"{settings.max_seq_len}; give both the same, or only the latter"
            )


def _train_samples(
    settings: DataSettings, tokenizer: Tokenizer
) -> Samples | Mixture | PackedDocuments:
    loader = settings.train_loader
    if isinstance(loader, FinetuningLoader):
        return build_packed(loader.dataset, settings, tokenizer, "train_loader.dataset")
    shuffle = loader.dataset.shuffle

    def samples(tokens: Tokens, key: str) -> Samples:
        with _named(key):
            return Samples(tokens, settings.max_seq_len, settings.seed, shuffle)

    if isinstance(loader, StdlibLoader) or loader.dataset.streams is None:
        return samples(_loader_tokens(loader, tokenizer, "train_loader"), "train_loader.dataset")
    key = "train_loader.dataset.streams"
    sources = streams_of(loader.dataset, "train_loader.dataset")
    streams = {
        name: samples(_source_tokens(stream, tokenizer, f"{key}.{name}"), f"{key}.{name}")
        for name, stream in sources.items()
    }
    weights = {name: stream.proportion for name, stream in sources.items()}
    return Mixture(streams, weights, settings.seed)


def _loader_tokens(loader: StdlibLoader | TextLoader, tokenizer: Tokenizer, key: str) -> Tokens:
    if isinstance(loader, StdlibLoader):
        try:
            documents = python_stdlib(held_out=key != "train_loader")
        except ConfigError as error:
            raise ConfigError(f"{key}.{error}") from None
        return tokenize((document.text for document in documents), tokenizer, key)
    if loader.dataset.streams is not None:
        raise ConfigError(f"{key}.dataset.streams mixes training text; score one source at a time")
    return _source_tokens(loader.dataset, tokenizer, f"{key}.dataset")


def _source_tokens(source: Source, tokenizer: Tokenizer, key: str) -> Tokens:
    check_source(source, key)
    if source.packed is not None:
        return _open_packed(source.packed, tokenizer, key)
    if source.local is not None and reads_tokens(source, mds_folder(source), f"{key}.local"):
        return MdsTokens(
            mds_folder(source), tokenizer.vocab_size, f"{key}.local", source.token_encoding_type
        )
    return tokenize(read_documents(source, key), tokenizer, key)


def _open_packed(folder: str, tokenizer: Tokenizer, key: str) -> TokenFile:
    try:
        tokens = TokenFile(folder)
    except ConfigError as error:
        raise ConfigError(f"{key}.packed {error}") from None
    packed_by = tokens.manifest["tokenizer"]
    if packed_by != tokenizer.identity:
        raise ConfigError(
            f"{key}.packed {folder!r} was packed by the tokenizer {packed_by}, and the config's is "
            f"{tokenizer.identity}; name that one, or pack the text again"
        )
    return tokens


def tokenize(documents: Iterable[bytes], tokenizer: Tokenizer, key: str) -> Ids:
    """Return the ids of all documents [tokens], each document followed by the end id.

    Raises ConfigError if there is no text, or more than fits in memory. `key` is the config key
    that the error names.
    """
    dtype = ids_dtype(tokenizer.vocab_size)
    counter = LossCounter(tokenizer)
    parts: list[Ids] = []
    end = np.array([tokenizer.end], dtype=dtype)
    size = 0
    for document in documents:
        size += len(document)
        if size > _IN_MEMORY:
            raise ConfigError(
                f"{key} has more than {describe_bytes(_IN_MEMORY)} of text; run tokenyard data "
                "pack on it, and name the folder by dataset.packed"
            )
        parts += [counter.encode(document).astype(dtype, copy=False), end]
    if not parts:
        raise ConfigError(f"{key}: there is no text; every document that it names is empty or null")
    counter.loss.warn(key)
    return np.concatenate(parts)
