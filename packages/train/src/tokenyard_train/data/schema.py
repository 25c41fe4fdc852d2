"""Config sections for text: tokenizer, document sources, and mixtures of streams."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from tokenyard_models.strict_config import Strict, only
from tokenyard_train.data import foundry
from tokenyard_train.data.paths import LocalPath, TablePath


class Section(Strict):
    """A section in which a key without a value is as if it were not there.

    LLM Foundry's configs write `remote:` for shards that are local.
    """

    @model_validator(mode="before")
    @classmethod
    def _without_blank_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = cls.model_fields.keys() | foundry.BLANK
        return {
            key: value
            for key, value in data.items()
            if key not in known or (value is not None and value != "")
        }


class TiktokenKwargs(Section):
    """A tiktoken encoding, by name or from a file of ranks with the pattern that splits text."""

    ignored: ClassVar[frozenset[str]] = foundry.TOKENIZER_KWARGS

    encoding_name: str | None = None  # name of an encoding, such as cl100k_base
    model_name: str | None = None  # name of a model whose encoding to use, such as gpt-4
    file: LocalPath | None = None  # ranks in tiktoken's file format
    pattern: str | None = None  # with file: regular expression that splits text before BPE
    add_bos_token: Annotated[bool, only(False, "a token at the start of a document")] = (
        False  # only false: documents have an end token, and none at the start
    )
    special_tokens: dict[str, int] = {}  # with file: token text to id


class TokenizerConfig(Section):
    """The tokenizer. `bytes` maps each byte to its value and ends a document with 256."""

    name: LocalPath = "bytes"  # bytes, tiktoken, or the path of a tokenizer.json or its folder
    eos_token: str | None = (
        # end-of-document token of a tokenizer.json; None: read from tokenizer_config.json beside it
        None
    )
    kwargs: TiktokenKwargs | None = None  # options of tiktoken


class StdlibDataset(Section):
    """Options for reading the standard library."""

    ignored: ClassVar[frozenset[str]] = foundry.DATASET | {"split", "token_encoding_type"}

    max_seq_len: int | None = Field(
        None,
        exclude=True,  # tokens per sample; None or that of the config
    )
    shuffle: bool = True  # draw a new sample order for each epoch


class StdlibLoader(Section):
    """The installed Python's standard library as text. One file in 20 is held out."""

    ignored: ClassVar[frozenset[str]] = foundry.LOADER

    name: Literal["python_stdlib"]  # selects this loader
    dataset: StdlibDataset = StdlibDataset()


Version = Annotated[int, Field(ge=0)]
EncodingType = Literal["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]

LOCATION_KEYS = ("path", "packed", "local", "hf_name", "delta")
"""The keys that locate text. A source sets exactly one of them."""


class Source(Section):
    """A location to read documents from."""

    ignored: ClassVar[frozenset[str]] = foundry.DATASET

    path: LocalPath | list[LocalPath] | None = None  # files and folders: text, JSON, .parquet
    packed: LocalPath | None = None  # output folder of tokenyard data pack
    local: LocalPath | None = None  # folder of MDS shards
    hf_name: LocalPath | None = None  # Hugging Face dataset: a folder, or a name on the hub
    delta: TablePath | None = None  # Delta table: a folder, a URI, or uc://catalog.schema.table
    version: Version | None = None  # delta: version to read; None: the newest at the start
    split: str | None = None  # local: subfolder; hf_name: split of the dataset, default train
    streaming: bool = True  # hf_name: read while downloading
    text_key: str = "text"  # column that holds the text, in JSON, .parquet, MDS, hf_name and delta
    max_seq_len: int | None = Field(
        None,
        exclude=True,  # tokens per sample; None or that of the config
    )
    token_encoding_type: EncodingType = "int64"  # local: dtype of ids in a column of bytes
    suffixes: list[str] = [
        # file suffixes to read from folders
        ".txt",
        ".md",
        ".py",
        ".jsonl",
        ".jsonl.gz",
        ".jsonl.zst",
        ".parquet",
    ]

    def locations(self) -> list[str]:
        """Return the names of the LOCATION_KEYS that are set."""
        return [name for name in LOCATION_KEYS if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _one_location(self) -> Source:
        _check_exactly_one(self.locations(), LOCATION_KEYS)
        return self


class Stream(Source):
    """One of several sources that are mixed."""

    proportion: float = Field(1.0, gt=0)  # share of the samples, relative to the other streams


class TextDataset(Source):
    """One source, or several streams mixed by weight."""

    streams: dict[str, Stream] | None = None
    shuffle: bool = True  # draw a new sample order for each epoch

    @model_validator(mode="after")
    def _one_location(self) -> TextDataset:
        locations = self.locations() + (["streams"] if self.streams else [])
        _check_exactly_one(locations, (*LOCATION_KEYS, "streams"))
        return self


def _check_exactly_one(keys: list[str], known: tuple[str, ...]) -> None:
    if len(keys) != 1:
        has = " and ".join(keys) if keys else "none"
        raise ValueError(f"it has {has}; give exactly one of {', '.join(known)}")


class TextLoader(Section):
    """The user's own text."""

    ignored: ClassVar[frozenset[str]] = foundry.LOADER

    name: Literal["text"]  # selects this loader
    dataset: TextDataset


def _check_target_prompts(value: str) -> str:
    if not re.fullmatch(r"none|all|length>=[0-9]{1,9}", value):
        raise ValueError("give none, all, or length>= and a number of tokens")
    return value


def _check_packing_ratio(value: Any) -> Any:
    if value not in ("auto", 1) or value is True:
        raise ValueError("rows are packed by first fit, which needs no ratio; say auto, or 1")
    return value


class RowSource(Section):
    """A location to read rows from: conversations, or prompts and responses."""

    ignored: ClassVar[frozenset[str]] = foundry.DATASET | foundry.FINETUNING

    path: LocalPath | list[LocalPath] | None = None  # files and folders: JSON, .parquet
    hf_name: LocalPath | None = None  # Hugging Face dataset: a folder, or a name on the hub
    delta: TablePath | None = None  # Delta table: a folder, a URI, or uc://catalog.schema.table
    version: Version | None = None  # delta: version to read; None: the newest at the start
    split: str | None = None  # hf_name: split of the dataset, default train
    streaming: bool = True  # hf_name: read while downloading
    suffixes: list[str] = [
        # file suffixes to read from folders
        ".jsonl",
        ".json",
        ".jsonl.gz",
        ".jsonl.zst",
        ".parquet",
    ]


class FinetuningDataset(RowSource):
    """Rows to fine-tune on, packed into samples by first fit."""

    max_seq_len: int | None = Field(
        None,
        exclude=True,  # tokens per sample; None or that of the config
    )
    shuffle: bool = True  # pack in a drawn order, and draw a new order of samples for each epoch
    target_responses: Literal["all", "last"] = "all"  # the answers whose tokens are supervised
    target_prompts: Annotated[str, AfterValidator(_check_target_prompts)] = (
        # the prompts whose tokens are supervised: none, all, or length>=N
        "none"
    )
    chat_template: LocalPath | None = None  # file of a Jinja template; None: the tokenizer's own
    overlong: Literal["refuse", "drop"] = "refuse"  # action for a row longer than max_seq_len
    packing_ratio: Annotated[Any, AfterValidator(_check_packing_ratio)] = (
        "auto"  # auto: samples are filled as far as they go; 1: each row is alone
    )
    decoder_only_format: Annotated[bool, only(True, "an encoder-decoder model")] = True  # only true

    @model_validator(mode="after")
    def _one_location(self) -> FinetuningDataset:
        keys = ("path", "hf_name", "delta")
        _check_exactly_one([key for key in keys if getattr(self, key) is not None], keys)
        return self


class FinetuningLoader(Section):
    """The user's own conversations, instructions, or prompts and responses."""

    ignored: ClassVar[frozenset[str]] = foundry.LOADER

    name: Literal["finetuning"]  # selects this loader
    dataset: FinetuningDataset


Loader = StdlibLoader | TextLoader | FinetuningLoader
LoaderConfig = Annotated[Loader, Field(discriminator="name")]


@dataclass(frozen=True)
class DataSettings:
    """The data-related values of a resolved training config."""

    tokenizer: TokenizerConfig
    train_loader: Loader
    eval_loader: Loader | None
    max_seq_len: int  # tokens per sample
    seed: int  # for shuffling
    eval_batch_size: int  # samples per forward pass in evaluation
    eval_batches: int  # held-out batches to score; -1: all
    eval_loaders: Mapping[str, Loader] = field(default_factory=dict)  # by label

    def loaders(self) -> dict[str, Loader]:
        """Return all loaders by their config key."""
        first = {"train_loader": self.train_loader, "eval_loader": self.eval_loader}
        labelled = {f"eval_loaders.{label}": each for label, each in self.eval_loaders.items()}
        return {key: loader for key, loader in first.items() if loader is not None} | labelled
