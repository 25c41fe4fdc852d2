"""The data that a config names."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenyard import ConfigError
from tokenyard_train.config.schema import PythonStdlib, Text, TrainConfig
from tokenyard_train.data.corpus import Document, python_stdlib, text_files
from tokenyard_train.data.samples import HeldOut, Samples
from tokenyard_train.data.tokenizer import Ids, Tokenizer, build_tokenizer


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    tokenizer: Tokenizer
    train: Samples
    held_out: HeldOut | None


def build_data(config: TrainConfig) -> Data:
    """Read and tokenize the text of a resolved config. Raises ConfigError for text that is missing or too short."""
    tokenizer = build_tokenizer(config.tokenizer)
    loader = config.train_loader
    train = _tokens(loader, tokenizer, "train_loader")
    samples = Samples(train, config.max_seq_len, config.seed, loader.dataset.shuffle)
    if config.eval_loader is None:
        return Data(tokenizer, samples, None)
    held_out = _tokens(config.eval_loader, tokenizer, "eval_loader")
    batch_size, batches = config.device_eval_batch_size or 1, config.eval_subset_num_batches or -1
    return Data(tokenizer, samples, HeldOut(held_out, config.max_seq_len, batch_size, batches))


def _tokens(loader: PythonStdlib | Text, tokenizer: Tokenizer, where: str) -> Ids:
    documents = _documents(loader, where)
    if not documents:
        raise ConfigError(f"{where}: there is no text; every file that it names is empty")
    end = np.array([tokenizer.end], dtype=np.uint16)
    return np.concatenate([part for d in documents for part in (tokenizer.encode(d.text), end)])


def _documents(loader: PythonStdlib | Text, where: str) -> list[Document]:
    try:
        if isinstance(loader, PythonStdlib):
            return python_stdlib(held_out=where == "eval_loader")
        return text_files(loader.dataset.path, loader.dataset.suffixes)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from None
