"""What a config says of text: the tokenizer, where documents come from, and how streams are mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tokenyard_models.schema import Strict
from tokenyard_train.data import foundry


class TiktokenKwargs(Strict):
    """Which encoding of tiktoken: by name, or from a file of ranks with the pattern that splits text."""

    ignored: ClassVar[frozenset[str]] = foundry.TOKENIZER_KWARGS

    encoding_name: str | None = None  # such as cl100k_base
    model_name: str | None = None  # the encoding of a model, such as gpt-4
    file: str | None = None  # of ranks, as tiktoken writes them
    pattern: str | None = None  # splits text before ranks are used; with file
    special_tokens: dict[str, int] = {}  # ids by text; with file


class Tokenizer(Strict):
    """How text becomes ids. `bytes`: each byte its value, and 256 ends a document."""

    name: str = (
        "bytes"  # bytes, tiktoken, or the path of a Hugging Face tokenizer.json or its folder
    )
    eos_token: str | None = (
        None  # of a tokenizer.json; None: what the tokenizer_config.json beside it says
    )
    kwargs: TiktokenKwargs | None = None  # of tiktoken


class StdlibDataset(Strict):
    """How the standard library is read."""

    ignored: ClassVar[frozenset[str]] = foundry.DATASET | {"split"}

    shuffle: bool = True  # samples, anew in each epoch


class PythonStdlib(Strict):
    """The text of the installed Python's standard library; a fixed share of its files is held out for evaluation."""

    ignored: ClassVar[frozenset[str]] = foundry.LOADER

    name: Literal["python_stdlib"]  # this one
    dataset: StdlibDataset = StdlibDataset()


PLACES = ("path", "packed", "local", "hf_name")
"""The keys that say where text comes from; a source has exactly one of them."""


class Source(Strict):
    """Where documents come from."""

    ignored: ClassVar[frozenset[str]] = foundry.DATASET

    path: str | list[str] | None = None  # files and folders: text, .jsonl (.gz, .zst), .parquet
    packed: str | None = None  # a folder that tokenyard data pack wrote
    local: str | None = None  # a folder of MDS shards
    hf_name: str | None = None  # a dataset of Hugging Face's: a folder, or a name on its hub
    split: str | None = None  # of local: a folder in it; of hf_name: a split, train if not given
    streaming: bool = True  # hf_name: read while it downloads
    text_key: str = "text"  # the column of .jsonl, .parquet, MDS and hf_name that holds the text
    suffixes: list[str] = [
        ".txt",
        ".md",
        ".py",
        ".jsonl",
        ".jsonl.gz",
        ".jsonl.zst",
        ".parquet",
    ]  # taken from folders

    def places(self) -> list[str]:
        """List which of PLACES are given."""
        return [name for name in PLACES if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        _exactly_one(self.places(), PLACES)
        return self


class Stream(Source):
    """One of several sources that are mixed."""

    proportion: float = Field(1.0, gt=0)  # of the samples, in proportion to the other streams'


class TextDataset(Source):
    """One source, or several streams mixed by weight."""

    streams: dict[str, Stream] | None = None
    shuffle: bool = True  # samples, anew in each epoch

    @model_validator(mode="after")
    def _one_place(self) -> TextDataset:
        given = self.places() + (["streams"] if self.streams else [])
        _exactly_one(given, (*PLACES, "streams"))
        return self


def _exactly_one(given: list[str], known: tuple[str, ...]) -> None:
    if len(given) != 1:
        has = " and ".join(given) if given else "none"
        raise ValueError(f"it has {has}; give exactly one of {', '.join(known)}")


class Text(Strict):
    """Text of the user's."""

    ignored: ClassVar[frozenset[str]] = foundry.LOADER

    name: Literal["text"]  # this one
    dataset: TextDataset


Loader = Annotated[PythonStdlib | Text, Field(discriminator="name")]


@dataclass(frozen=True)
class DataSettings:
    """What a resolved training config says of data."""

    tokenizer: Tokenizer
    train_loader: PythonStdlib | Text
    eval_loader: PythonStdlib | Text | None
    max_seq_len: int  # tokens of a sample
    seed: int  # of shuffling
    eval_batch_size: int  # samples of a forward pass when scoring
    eval_batches: int  # of held-out text to score; -1: all
