"""Read, tokenize and pack the documents of a finetuning dataset."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenyard import ConfigError
from tokenyard_train.data.finetuning.conversation import Conversations
from tokenyard_train.data.finetuning.packed import PackedDocuments, TokenizedDocuments
from tokenyard_train.data.finetuning.segment import Segment
from tokenyard_train.data.finetuning.template import read_template
from tokenyard_train.data.schema import DataSettings, FinetuningDataset
from tokenyard_train.data.sources.rows import Rows, read_rows
from tokenyard_train.data.text_loss import LossCounter
from tokenyard_train.data.tokenizer import Tokenizer
from tokenyard_train.data.tokens import Ids, ids_dtype
from tokenyard_train.data.unused_keys import check_source

log = logging.getLogger("tokenyard")

_MOST_TOKENS = 1 << 29  # in memory, on each rank


class _Document(NamedTuple):
    ids: Ids  # [tokens]
    targets: NDArray[np.bool_]  # [tokens]


def build_packed(
    dataset: FinetuningDataset, settings: DataSettings, tokenizer: Tokenizer, key: str
) -> PackedDocuments:
    """Return the packed documents of a dataset. `key` is its config key, for errors.

    Raises ConfigError, one sentence with file and row, for a row that cannot be trained on.
    """
    check_source(dataset, key)
    template = read_template(dataset.chat_template, settings.tokenizer, f"{key}.chat_template")
    conversations = Conversations(template, dataset.target_responses == "last")
    encode = _Encoder(tokenizer, _prompt_rule(dataset.target_prompts))
    tokenized = _tokenize(
        read_rows(dataset, key), conversations, encode, settings.max_seq_len, dataset, key
    )
    encode.warn(key)
    conversations.left_out.warn(key)
    packed = dataset.packing_ratio == "auto"
    return PackedDocuments(tokenized, settings.max_seq_len, settings.seed, dataset.shuffle, packed)


def _prompt_rule(target_prompts: str) -> Callable[[int], bool]:
    """Return whether a prompt of some tokens is supervised, by LLM Foundry's rule."""
    if target_prompts == "none":
        return lambda tokens: False
    least = 0 if target_prompts == "all" else int(target_prompts.removeprefix("length>="))
    return lambda tokens: tokens >= least


class _Encoder:
    """Tokenizes segments. Each is tokenized alone, as a prompt is when text is generated."""

    def __init__(self, tokenizer: Tokenizer, prompt_is_target: Callable[[int], bool]):
        self.tokenizer = tokenizer
        self.counter = LossCounter(tokenizer)
        self.prompt_is_target = prompt_is_target
        self.dtype = ids_dtype(tokenizer.vocab_size)

    def __call__(self, segments: Iterable[Segment], location: str) -> _Document:
        """Return the document of segments. Raises ConfigError, naming `location`."""
        ids: list[Ids] = []
        targets: list[NDArray[np.bool_]] = []
        for segment in segments:
            part = self._ids(segment, location)
            supervised = segment.answer or self.prompt_is_target(len(part))
            ids.append(part)
            targets.append(np.full(len(part), supervised))
        whole = _Document(np.concatenate(ids), np.concatenate(targets))
        whole.targets[:1] = False  # nothing comes before it, from which it could be predicted
        if not whole.targets.any():
            raise ConfigError(
                f"{location}: its answers have no tokens; look at the chat template, or leave the "
                "row out"
            )
        return whole

    def warn(self, key: str) -> None:
        """Log a warning if ids do not represent their text."""
        self.counter.loss.ended = 0  # the templates of chats write the end of a document
        self.counter.loss.warn(key, "prompts and answers")

    def _ids(self, segment: Segment, location: str) -> Ids:
        try:
            text = segment.text.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"{location} has a lone surrogate, which is not text") from None
        ids = self.counter.encode(text).astype(self.dtype, copy=False)
        return np.append(ids, np.array(self.tokenizer.end, self.dtype)) if segment.ended else ids


def _tokenize(
    rows: Rows,
    conversations: Conversations,
    encode: _Encoder,
    length: int,
    dataset: FinetuningDataset,
    key: str,
) -> TokenizedDocuments:
    documents: list[_Document] = []
    dropped = 0
    tokens = 0
    for location, row in rows:
        document = encode(conversations.segments(row, location), location)
        if len(document.ids) - 1 > length:
            dropped += 1
            if dataset.overlong == "refuse":
                raise _too_long(document, location, length)
            continue
        documents.append(document)
        tokens += len(document.ids)
        if tokens > _MOST_TOKENS:
            raise ConfigError(
                f"{key} has more than {_MOST_TOKENS:,} tokens, and they are kept in memory; give "
                "fewer rows"
            )
    if dropped:
        log.warning("%s: %d rows are longer than max_seq_len; dropped", key, dropped)
    if not documents:
        reason = f"all {dropped} are longer than max_seq_len" if dropped else "every file is empty"
        raise ConfigError(f"{key} has no row that can be trained on; {reason}")
    ids, targets = (np.concatenate(parts) for parts in zip(*documents))
    ends = np.cumsum([len(document.ids) for document in documents])
    return TokenizedDocuments(ids, targets, ends)


def _too_long(document: _Document, location: str, length: int) -> ConfigError:
    return ConfigError(
        f"{location} has {len(document.ids) - 1:,} tokens, of which {document.targets.sum():,} are "
        f"supervised, and max_seq_len is {length:,}; raise it, shorten the row, or say "
        "dataset.overlong: drop"
    )
