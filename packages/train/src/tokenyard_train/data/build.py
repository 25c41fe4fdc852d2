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
    train = _tokens(_documents(loader, held_out=False), tokenizer, "train_loader")
    shuffle = loader.shuffle if isinstance(loader, PythonStdlib) else loader.dataset.shuffle
    samples = Samples(train, config.max_seq_len, config.seed, shuffle)
    if config.eval_loader is None:
        return Data(tokenizer, samples, None)
    held_out = _tokens(_documents(config.eval_loader, held_out=True), tokenizer, "eval_loader")
    batch_size = config.device_eval_batch_size or 1
    return Data(tokenizer, samples, HeldOut(held_out, config.max_seq_len, batch_size, config.eval_subset_num_batches))


def _documents(loader: PythonStdlib | Text, held_out: bool) -> list[Document]:
    if isinstance(loader, PythonStdlib):
        return python_stdlib(held_out)
    return text_files(loader.dataset.path, loader.dataset.suffixes)


def _tokens(documents: list[Document], tokenizer: Tokenizer, where: str) -> Ids:
    if not documents:
        raise ConfigError(f"{where}: there is no text; every file that it names is empty")
    end = np.array([tokenizer.end], dtype=np.uint16)
    return np.concatenate([part for d in documents for part in (tokenizer.encode(d.text), end)])
