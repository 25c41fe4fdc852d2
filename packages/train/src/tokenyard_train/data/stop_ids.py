"""The folder of a tokenizer, and the ids beside it that end a document."""

from __future__ import annotations

import logging
from pathlib import Path

from tokenyard import ConfigError
from tokenyard.bounded import read_json
from tokenyard_train.data.schema import TokenizerConfig

log = logging.getLogger("tokenyard")


def tokenizer_folder(config: TokenizerConfig) -> Path | None:
    """Return the folder of a tokenizer.json. None for other tokenizers."""
    path = Path(config.name)
    if path.is_dir():
        return path
    return path.parent if path.name == "tokenizer.json" else None


def tokenizer_stop_ids(config: TokenizerConfig) -> frozenset[int]:
    """Return the ids beside a tokenizer that end a document in addition to its own end."""
    folder = tokenizer_folder(config)
    return frozenset() if folder is None else stop_ids(folder)


def stop_ids(folder: Path) -> frozenset[int]:
    """Return the end-of-document ids in a Hugging Face folder's generation_config.json.

    The set is empty, with a warning, if the file is unusable.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return frozenset()
    try:
        ids = read_json(path).get("eos_token_id")
    except ConfigError as error:
        log.warning("%s; the tokenizer alone says how a document ends", error)
        return frozenset()
    listed = ids if isinstance(ids, list) else [ids]
    known = frozenset(i for i in listed if isinstance(i, int) and not isinstance(i, bool))
    if ids is not None and len(known) < len(set(map(str, listed))):
        log.warning(
            "%s has the eos_token_id %r; values that are not integers are ignored", path, ids
        )
    return known
