"""Refuse keys of data sections that would have no effect."""

from __future__ import annotations

from typing import Any

from tokenyard import ConfigError
from tokenyard_train.data.schema import RowSource, Source, Stream, TextDataset, TokenizerConfig

_EFFECTIVE = {
    "path": ("text_key", "suffixes"),
    "packed": (),
    "local": ("split", "text_key", "token_encoding_type"),
    "hf_name": ("split", "streaming", "text_key"),
    "delta": ("version", "text_key"),
}
"""The keys of a source that have an effect, by the key that locates it."""
_KEYS = ("split", "streaming", "text_key", "token_encoding_type", "suffixes", "version")


def check_source(source: Source | RowSource, key: str) -> None:
    """Raise ConfigError for a key that has no effect beside the location of a source."""
    location = next(name for name in _EFFECTIVE if getattr(source, name, None) is not None)
    for name, value in _given(source).items():
        if name not in _EFFECTIVE[location]:
            users = _locations(name, source)
            raise _no_effect(f"{key}.{name}", value, f"beside {location}", users)


def streams_of(dataset: TextDataset, key: str) -> dict[str, Stream]:
    """Return the streams of a dataset, with the dataset's own keys as their defaults.

    LLM Foundry's `split` beside `streams` has this meaning. Raises ConfigError for a key that has
    no effect in any stream.
    """
    streams = dict(dataset.streams or {})
    for name, value in _given(dataset).items():
        takers = [s for s, stream in streams.items() if name in _EFFECTIVE[stream.locations()[0]]]
        if not takers:
            raise _no_effect(f"{key}.{name}", value, "in any stream", _locations(name, dataset))
        for taker in takers:
            if name not in streams[taker].model_fields_set:
                streams[taker] = streams[taker].model_copy(update={name: value})
    return streams


def check_tokenizer(config: TokenizerConfig, eos_key: str = "tokenizer.eos_token") -> None:
    """Raise ConfigError for an option that a tokenizer does not have."""
    file = "a tokenizer.json"
    if config.eos_token is not None and config.name in ("bytes", "tiktoken"):
        raise _no_effect(eos_key, config.eos_token, f"with {config.name}", file)
    given = config.kwargs.model_dump(exclude_defaults=True) if config.kwargs else {}
    if given and config.name != "tiktoken":
        name = "bytes" if config.name == "bytes" else file
        raise _no_effect("tokenizer.kwargs", given, f"with {name}", "tiktoken")
    names = [key for key in ("file", "encoding_name", "model_name") if key in given]
    for key in names[1:]:
        raise ConfigError(
            f"tokenizer.kwargs has {names[0]} {given[names[0]]!r} and {key} {given[key]!r}; give "
            "one of them"
        )
    for option in ("pattern", "special_tokens"):
        if option in given and names and names[0] != "file":
            raise _no_effect(
                f"tokenizer.kwargs.{option}", given[option], f"beside {names[0]}", "file"
            )


def _given(source: Source | RowSource) -> dict[str, Any]:
    """Return the keys that are set. A default has the same effect as no key."""
    fields = type(source).model_fields
    values = {name: getattr(source, name) for name in _KEYS if name in fields}
    return {name: value for name, value in values.items() if value != fields[name].default}


def _locations(name: str, source: Source | RowSource) -> str:
    """Return the locations of such a source beside which a key has an effect."""
    places = [place for place, keys in _EFFECTIVE.items() if name in keys]
    return " and ".join(place for place in places if place in type(source).model_fields)


def _no_effect(key: str, value: Any, where: str, users: str) -> ConfigError:
    return ConfigError(
        f"{key} is {value!r}, which has no effect {where}; leave it out, it is for {users}"
    )
