"""Translate the tokenizer and the loaders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenyard import ConfigError
from tokenyard_train.config.translate.change import Change
from tokenyard_train.config.translate.hub import cached_folder

_BUILT_IN = ("bytes", "tiktoken")
_LOCAL_FORMATS = ("json", "parquet")


def translate_tokenizer(config: Mapping[str, Any], changes: list[Change]) -> dict[str, Any]:
    """Return a config whose tokenizer is a folder where the cache has its hub name."""
    section = config.get("tokenizer")
    if not isinstance(section, Mapping):
        return dict(config)
    name = section.get("name")
    if not isinstance(name, str) or name in _BUILT_IN or Path(name).expanduser().exists():
        return dict(config)
    folder = cached_folder(name)
    if folder is None:  # build_tokenizer reports it
        return dict(config)
    changes.append(Change("tokenizer.name", f"{folder}, from the local Hugging Face cache"))
    return {**config, "tokenizer": {**section, "name": str(folder)}}


def translate_loaders(config: Mapping[str, Any], changes: list[Change]) -> dict[str, Any]:
    """Return a config whose finetuning loaders locate their rows, and pack them, as here.

    A list of eval loaders becomes `eval_loaders`, by label.
    """
    read = _by_label(config, changes)
    for key in ("train_loader", "eval_loader"):
        if key in read:
            read[key] = _loader(read[key], key, changes)
    labelled = read.get("eval_loaders")
    if isinstance(labelled, Mapping):
        read["eval_loaders"] = {
            label: _loader(loader, f"eval_loaders.{label}", changes)
            for label, loader in labelled.items()
        }
    return read


def _by_label(config: Mapping[str, Any], changes: list[Change]) -> dict[str, Any]:
    """Return a config with `eval_loaders` by label in place of a list. Raises ConfigError."""
    read = dict(config)
    for key in ("eval_loader", "eval_loaders"):
        given = read.get(key)
        if not isinstance(given, list):
            continue
        loaders: dict[str, Any] = {}
        for number, loader in enumerate(given):
            label = loader.get("label") if isinstance(loader, Mapping) else None
            if not isinstance(label, str) or label in loaders:
                raise ConfigError(
                    f"{key}.{number}.label is {label!r}; give each eval loader a name of its own"
                )
            loaders[label] = {name: value for name, value in loader.items() if name != "label"}
        del read[key]
        if read.get("eval_loaders"):
            raise ConfigError(f"{key} is a list and eval_loaders is set, too; put all in one")
        read["eval_loaders"] = loaders
        changes.append(Change(key, f"eval_loaders: {', '.join(loaders)}", told=False))
    return read


def _loader(loader: Any, key: str, changes: list[Change]) -> Any:
    if not isinstance(loader, Mapping) or loader.get("name") != "finetuning":
        return loader
    dataset = loader.get("dataset")
    if not isinstance(dataset, Mapping):
        return loader
    return {**loader, "dataset": _rows(dataset, f"{key}.dataset", changes)}


def _rows(dataset: Mapping[str, Any], where: str, changes: list[Change]) -> dict[str, Any]:
    """Set what LLM Foundry does by default, in a section with a key that only its files have."""
    for key in ("streams", "local"):
        if dataset.get(key):
            raise ConfigError(
                f"{where}.{key} names MDS shards, and finetuning reads rows of JSON lines, Parquet "
                "or a dataset of Hugging Face; write them so, and give path"
            )
    rest = {name: value for name, value in dataset.items() if name not in ("streams", "local")}
    read = _local_files(rest, where, changes)
    if "decoder_only_format" not in read:
        return read
    if read.get("target_responses") is None:
        read["target_responses"] = "last"
        changes.append(Change(f"{where}.target_responses", "last; it is not set"))
    if read.get("packing_ratio") is None and where.startswith("train"):
        read["packing_ratio"] = 1
        note = "1; it is not set, so each row is alone; auto packs rows, and is faster"
        changes.append(Change(f"{where}.packing_ratio", note))
    return read


def _local_files(dataset: Mapping[str, Any], where: str, changes: list[Change]) -> dict[str, Any]:
    """Replace the format in `hf_name` and the files in `hf_kwargs` by their location."""
    read = dict(dataset)
    options = read.get("hf_kwargs")
    if not isinstance(options, Mapping) or read.get("hf_name") not in _LOCAL_FORMATS:
        return read
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) != 1 or not set(given) <= {"data_dir", "data_files"}:
        raise ConfigError(
            f"{where}.hf_kwargs has {', '.join(given) or 'nothing'}; give data_dir, or data_files "
            "as a path or a list of paths"
        )
    ((name, files),) = given.items()
    if isinstance(files, Mapping):  # by split
        files = files.get(read.get("split") or "train")
    if not isinstance(files, str | list):
        raise ConfigError(
            f"{where}.hf_kwargs.{name} is {given[name]!r}; give a path or a list of paths, or one "
            "for the split"
        )
    # datasets finds the files of a split in a folder by their names; files alone are one split
    key = "hf_name" if name == "data_dir" else "path"
    left_out = ("hf_kwargs", "hf_name") if key == "hf_name" else ("hf_kwargs", "hf_name", "split")
    changes.append(Change(f"{where}.hf_kwargs.{name}", f"{key}: {files}"))
    return {key: files} | {k: v for k, v in read.items() if k not in left_out}
