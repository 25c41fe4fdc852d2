"""Give an exported folder the tokenizer that its weights were trained with."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenyard_train.commands.load_model import LoadedModel
from tokenyard_train.data import BytesTokenizer, build_tokenizer
from tokenyard_train.data.schema import TokenizerConfig

BYTES_END = "<|endoftext|>"
"""The token that ends a document in the tokenizer.json of bytes."""

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)

log = logging.getLogger("tokenyard")


@contextmanager
def tokenizer_folder(loaded: LoadedModel) -> Iterator[Path | None]:
    """Context: a folder with the model's tokenizer and token ids, as `to_hf` takes by `like`.

    None with a warning if the tokenizer has no tokenizer.json.
    """
    name = loaded.tokenizer.name
    if loaded.source is not None and Path(name) in (loaded.source, loaded.source.resolve()):
        yield loaded.source
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if name == "bytes":
            _write_bytes_tokenizer(folder)
            end = BytesTokenizer.end
        elif Path(name).exists():
            _copy_tokenizer(loaded.tokenizer, folder)
            end = build_tokenizer(loaded.tokenizer).end
        else:
            log.warning(
                "the folder is written without its tokenizer, tokenizer.name %r, which is no "
                "tokenizer.json; give generate a tokenizer by --tokenizer",
                name,
            )
            yield None
            return
        _write_json(folder / "config.json", {"eos_token_id": end})
        yield folder


def _copy_tokenizer(config: TokenizerConfig, folder: Path) -> None:
    path = Path(config.name)
    source = path if path.is_dir() else path.parent
    for name in _FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    if path.is_file():
        shutil.copy(path, folder / "tokenizer.json")
    if config.eos_token is not None:
        options = folder / "tokenizer_config.json"
        given = json.loads(options.read_text(encoding="utf-8")) if options.exists() else {}
        _write_json(options, given | {"eos_token": config.eos_token})


def _write_bytes_tokenizer(folder: Path) -> None:
    """Write a tokenizer.json that maps each byte to its value, and an end of document to 256."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    end = {
        "id": BytesTokenizer.end,
        "content": BYTES_END,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    model = {"type": "BPE", "vocab": _byte_characters(), "merges": []}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": BYTES_END}
    _write_json(folder / "tokenizer_config.json", options)


def _byte_characters() -> dict[str, int]:
    """Return the character that stands for each byte in GPT-2's byte-level tokenizers.

    Printable Latin-1 characters stand for themselves, the other bytes for characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {characters[byte]: byte for byte in range(256)}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
