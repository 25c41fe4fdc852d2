"""Give an exported folder the tokenizer that its weights were trained with."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tokenyard import ConfigError
from tokenyard.bounded import read_text
from tokenyard_models.hf import TOKENIZER_FILES, is_hf_folder
from tokenyard_train.commands.loaded_model import LoadedModel
from tokenyard_train.commands.tokenizer_json import bytes_tokenizer, tiktoken_tokenizer
from tokenyard_train.data import BytesTokenizer, build_tokenizer
from tokenyard_train.data.hf_tokenizer import without_training_state
from tokenyard_train.data.json_text import parse_json
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.stop_ids import tokenizer_folder
from tokenyard_train.data.tiktoken_tokenizer import TiktokenTokenizer

_CHAT_TEMPLATE = "chat_template.jinja"
_END = "<|endoftext|>"
"""The token that ends a document, of bytes and of tiktoken."""

log = logging.getLogger("tokenyard")


@contextmanager
def exported_tokenizer(loaded: LoadedModel) -> Iterator[Path | None]:
    """Context: a folder with the model's tokenizer and token ids, as `to_hf` takes by `like`.

    None with a warning that says why if the tokenizer cannot be written as a tokenizer.json. Raises
    CheckpointError if it has other content than in training.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path | None
        try:
            folder = _folder_of_tokenizer(loaded, Path(temporary))
        except ConfigError as error:
            log.warning(
                "the folder is written without its tokenizer: %s; give generate a tokenizer by "
                "--tokenizer",
                error,
            )
            folder = None
        with nullcontext() if folder is None else _like_trained(folder) as trained:
            if trained is None or loaded.chat_template is None:
                yield trained
            else:
                yield _with_template(trained, loaded.chat_template, Path(temporary) / "templated")


def _folder_of_tokenizer(loaded: LoadedModel, temporary: Path) -> Path:
    """Return the Hugging Face folder that the tokenizer is from, or a written one."""
    config = loaded.tokenizer
    if config.name == str(loaded.path):
        return loaded.path  # a folder that is converted, with or without a tokenizer
    loaded.build_tokenizer()
    loaded.stop_ids()  # warns if they have changed
    source = tokenizer_folder(config)
    if source is not None and is_hf_folder(source) and config.eos_token is None:
        return source
    _write_json(temporary / "config.json", {"eos_token_id": _write_tokenizer(config, temporary)})
    return temporary


@contextmanager
def _like_trained(source: Path) -> Iterator[Path]:
    """Context: a folder with the tokenizer of a Hugging Face folder as training used it."""
    tokenizer = source / "tokenizer.json"
    trained = _trained_json(tokenizer.read_bytes()) if tokenizer.is_file() else None
    if trained is None:
        yield source
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _copy_files(source, folder)
        (folder / "tokenizer.json").write_text(trained, encoding="utf-8")
        yield folder


def _with_template(source: Path, template: str, folder: Path) -> Path:
    """Copy a tokenizer into a new folder, with the chat template of the training."""
    _copy_files(source, folder)
    try:
        (folder / _CHAT_TEMPLATE).write_text(read_text(template), encoding="utf-8")
    except ConfigError as error:
        log.warning("the folder is written without the chat template of its training: %s", error)
    return folder


def _copy_files(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, and those with its token ids."""
    folder.mkdir(exist_ok=True)
    for name in (*TOKENIZER_FILES, "config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def _trained_json(content: bytes) -> str | None:
    """Return a tokenizer.json as training used it, or None if that is what it is."""
    try:
        trained = without_training_state(content)
    except ValueError:  # not a tokenizer, so training did not use it
        return None
    absent = {"truncation": None, "padding": None}
    return None if parse_json(trained) == absent | parse_json(content) else trained


def _write_tokenizer(config: TokenizerConfig, folder: Path) -> int:
    """Write the files of a tokenizer into a folder and return its end-of-document id.

    Raises ConfigError if it has no tokenizer.json.
    """
    if config.name == "bytes":
        _write_byte_level(folder, bytes_tokenizer(_END))
        return BytesTokenizer.end
    if config.name == "tiktoken":
        tokenizer = TiktokenTokenizer(config.kwargs)
        _write_byte_level(folder, tiktoken_tokenizer(tokenizer))
        return tokenizer.end
    end = build_tokenizer(config).end
    _copy_tokenizer(config, folder)
    return end


def _write_byte_level(folder: Path, tokenizer: dict[str, Any]) -> None:
    _write_json(folder / "tokenizer.json", tokenizer)
    # Training encodes the text of a special token as plain text.
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END,
        "split_special_tokens": True,
    }
    _write_json(folder / "tokenizer_config.json", options)


def _copy_tokenizer(config: TokenizerConfig, folder: Path) -> None:
    path = Path(config.name)
    source = path if path.is_dir() else path.parent
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    if path.is_file():
        shutil.copy(path, folder / "tokenizer.json")
    tokenizer = folder / "tokenizer.json"
    trained = _trained_json(tokenizer.read_bytes())
    if trained is not None:
        tokenizer.write_text(trained, encoding="utf-8")
    options = folder / "tokenizer_config.json"
    # Not `read_json`: transformers writes a model_max_length of 1e30.
    given = parse_json(options.read_bytes()) if options.exists() else {}
    # Without a class, transformers takes that of the model, with rules of its own for text.
    written = {"tokenizer_class": "PreTrainedTokenizerFast"} | given
    if config.eos_token is not None:
        written["eos_token"] = config.eos_token
    if written != given:
        _write_json(options, written)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
