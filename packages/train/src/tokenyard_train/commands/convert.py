"""Convert a model between a run, a Hugging Face folder and MegaBlocks' format."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console

from tokenyard import ConfigError, Model, count_parameters, merge_lora
from tokenyard.errors import one_of
from tokenyard.lora import adapters
from tokenyard_models import from_hf, to_hf
from tokenyard_models.hf import is_hf_folder, new_folder, to_megablocks, to_peft
from tokenyard_train.checkpoint import model_tensors, write_checkpoint
from tokenyard_train.commands.export_tokenizer import exported_tokenizer
from tokenyard_train.commands.load_model import load_weights_only
from tokenyard_train.commands.options import ConvertOptions
from tokenyard_train.commands.writing import print_reading, print_written, writing_report
from tokenyard_train.config.load import read_config
from tokenyard_train.data import build_tokenizer
from tokenyard_train.data.paths import HF
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.stop_ids import tokenizer_folder, tokenizer_stop_ids
from tokenyard_train.engine.base import base_digest
from tokenyard_train.folder_lock import lock_new_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")
_FORMATS = ("hf", "tokenyard", "megablocks", "peft")

log = logging.getLogger("tokenyard")


def convert(options: ConvertOptions, console: Console) -> None:
    """Write a model in another format to a new folder; print its size.

    LoRA adapters are merged, except for `to` peft, which writes them alone.

    `dtype` (a name in DTYPES), `fused` and `like` have the meaning of `to_hf`. Without `like`, a
    Hugging Face folder gets the tokenizer that the weights were trained with. Raises TokenyardError
    before anything is written.
    """
    one_of("--to", options.to, _FORMATS)
    if options.dtype is not None:
        one_of("--dtype", options.dtype, DTYPES)
    _check_options(options)
    with lock_new_folder(options.target):
        if options.target.exists():
            raise ConfigError(f"{options.target} exists already; give the name of a new folder")
        print_reading(console, options.source)
        written = _write(options, writing_report(console, options.target))
    print_written(console, options.target, written, options.to)


def _check_options(options: ConvertOptions) -> None:
    """Raise ConfigError for an option that has no effect, and for a folder without a tokenizer."""
    weights_alone = ("fused", "like", "tokenizer")
    unused = {
        "tokenyard": ("dtype", "fused", "like"),
        "megablocks": weights_alone,
        "peft": weights_alone,
    }
    for name in unused.get(options.to, ()):
        if getattr(options, name):
            raise ConfigError(f"--{name} has no effect with --to {options.to}; leave it out")
    if options.like is None:
        return
    if options.tokenizer is not None:
        raise ConfigError(
            f"--like {options.like} and --tokenizer {options.tokenizer} both name a tokenizer; "
            "give one of them"
        )
    if not options.like.is_dir():
        raise ConfigError(f"--like {options.like} is no folder; give one with a tokenizer")
    if not any((options.like / name).is_file() for name in _TOKENIZERS):
        raise ConfigError(
            f"--like {options.like} holds no tokenizer; give a folder with one of "
            f"{', '.join(_TOKENIZERS)}"
        )


def _write(options: ConvertOptions, report: Callable[[int, int], None]) -> str:
    """Write the folder, and describe what is in it. `report` is that of `to_hf`."""
    if options.to == "tokenyard":
        return _describe(_write_run(options.source, options.target, options.tokenizer))
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    loaded = load_weights_only(options.source, options.base, dtype)
    if options.to == "peft":
        base = None if loaded.source is None else str(loaded.source.resolve())
        digest = base_digest(loaded.model)
        count = to_peft(loaded.model, options.target, base=base, base_digest=digest, dtype=dtype)
        return f"adapters of {base or 'a base without a folder'}, {count:,} parameters"
    merged = ", adapters merged" if next(adapters(loaded.model), None) is not None else ""
    merge_lora(loaded.model)
    if options.to == "megablocks":
        to_megablocks(loaded.model, options.target, dtype=dtype, report=report)
    else:
        loaded = loaded.with_tokenizer(options.tokenizer)
        _check_vocabulary(options, loaded.model)
        like = nullcontext(options.like) if options.like else exported_tokenizer(loaded)
        with like as folder:
            to_hf(
                loaded.model,
                options.target,
                like=folder,
                dtype=dtype,
                fused=options.fused,
                report=report,
            )
    written = dtype or next(loaded.model.parameters()).dtype
    return f"{_describe(loaded.model)} in {str(written).removeprefix('torch.')}{merged}"


def _check_vocabulary(options: ConvertOptions, model: Model) -> None:
    """Raise ConfigError if the tokenizer of an option has ids that the model has no row for."""
    named = {"--tokenizer": options.tokenizer}
    if options.like is not None and (options.like / "tokenizer.json").is_file():
        named["--like"] = str(options.like)
    for option, name in named.items():
        ids = 0 if name is None else _count_ids(TokenizerConfig(name=name), option)
        if ids > model.vocab_size:
            raise ConfigError(
                f"{option} {name} has {ids} ids, and the model {model.vocab_size}; give the "
                "tokenizer that the model was trained with"
            )


def _count_ids(config: TokenizerConfig, option: str) -> int:
    """Return the ids of a tokenizer; 0 for one of --like that only transformers can build."""
    try:
        return build_tokenizer(config).vocab_size
    except ConfigError:
        if option == "--tokenizer":
            raise
        return 0


def _describe(model: Model) -> str:
    return f"{model.definition}, {count_parameters(model).total:,} parameters"


def _write_run(source: Path, target: Path, tokenizer: str | None) -> Model:
    """Write a Hugging Face folder as the checkpoint ba0 of a new run."""
    if not is_hf_folder(source):
        raise ConfigError(f"{source} has no config.json; give a Hugging Face folder")
    if tokenizer is None and not (source / "tokenizer.json").is_file():
        raise ConfigError(
            f"{source} has no tokenizer.json; give --tokenizer, the path of one or bytes"
        )
    config = read_config(
        {
            "load_path": f"{HF}{source.resolve()}",
            "tokenizer": {"name": tokenizer or str(source.resolve())},
            "train_loader": {"name": "python_stdlib"},
            "max_duration": "1ba",
            "global_train_batch_size": 1,
            "device": "cpu",
        }
    )
    digest = build_tokenizer(config.tokenizer).identity
    meta = {
        "batch": 0,
        "config": config.model_dump(mode="json"),
        "data": {"tokenizer": digest},
        "stop_ids": sorted(tokenizer_stop_ids(config.tokenizer)),
    }
    _warn_of_token_ids(source, config.tokenizer)
    model = from_hf(source, dtype=torch.float32)
    with new_folder(target) as folder:
        write_checkpoint(folder, "ba0", model_tensors(model), meta, keep=-1)
    return model


def _warn_of_token_ids(source: Path, tokenizer: TokenizerConfig) -> None:
    """Log a warning if a run does not keep the token ids of the folder that it is written from."""
    own = tokenizer_folder(tokenizer)
    if own is None or own.resolve() != source.resolve():
        log.warning(
            "the token ids and the generation_config.json of %s are of its own tokenizer; the run "
            "has the tokenizer %r and does not keep them",
            source,
            tokenizer.name,
        )
