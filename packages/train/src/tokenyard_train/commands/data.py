"""Run the subcommands of `tokenyard data`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from tokenyard import ConfigError
from tokenyard.paths import real_path
from tokenyard_models.strict_config import parse
from tokenyard_train.commands.options import PackOptions
from tokenyard_train.data.journal import PackProgress
from tokenyard_train.data.packing import pack
from tokenyard_train.data.schema import Source, TokenizerConfig
from tokenyard_train.data.sources import describe_source, read_documents
from tokenyard_train.data.sources.keys import SOURCE
from tokenyard_train.data.tokens import TokenFile, read_manifest
from tokenyard_train.data.unused_keys import check_tokenizer


def run_pack(console: Console, options: PackOptions) -> None:
    """Pack sources into a folder, with a progress bar. Raises ConfigError for unreadable text."""
    source = _source(options)
    _check_apart(options)
    start = time.monotonic()
    with _progress_bar(console) as bar:
        task = bar.add_task("packing", total=None, state="")

        def report(done: PackProgress) -> None:
            state = f"{done.documents:,} documents, {done.tokens:,} tokens"
            bar.update(task, completed=done.text_bytes, state=state)

        done = pack(
            options.out,
            lambda: read_documents(source, SOURCE),
            parse_tokenizer(options.tokenizer, options.eos_token),
            describe_source(source, SOURCE),
            options.workers or os.cpu_count() or 1,
            report,
            options.overwrite,
        )
    seconds = time.monotonic() - start
    console.print(
        f"{options.out}: {done.documents:,} documents, {done.tokens:,} tokens "
        f"of {done.text_bytes / 1e6:,.1f} MB of text in {seconds:.1f} s",
        highlight=False,
    )


def run_verify(console: Console, folder: Path) -> None:
    """Check every block of a packed folder. Raises CorruptError."""
    tokens = TokenFile(folder)
    tokens.verify()
    console.print(f"{folder}: all {len(tokens):,} tokens are as they were packed", highlight=False)


def run_info(console: Console, folder: Path) -> None:
    """Print a packed folder's manifest."""
    manifest = read_manifest(folder)
    for key in ("tokens", "documents", "text_bytes", "vocab_size"):
        console.print(f"{key.replace('_', ' '):<12} {manifest[key]:,}", highlight=False)
    for key in ("dtype", "tokenizer"):
        console.print(f"{key:<12} {manifest[key]}", highlight=False)
    for source in manifest["sources"]:
        console.print(f"source       {source.get('file', source)}", highlight=False)


def parse_tokenizer(text: str, eos_token: str | None) -> TokenizerConfig:
    """Return the config of a `--tokenizer` value: a name or path, or ``tiktoken:<encoding>``."""
    name, _, encoding = text.partition(":")
    options: dict[str, Any] = {"name": text}
    if name == "tiktoken":
        options = {"name": "tiktoken", "kwargs": {"encoding_name": encoding or None}}
    config = parse(TokenizerConfig, options | {"eos_token": eos_token})
    check_tokenizer(config, "--eos-token")
    return config


def _source(options: PackOptions) -> Source:
    if options.hf and options.mds:
        raise ConfigError("--hf and --mds were given; a source is one of them")
    location: dict[str, Any] = {"path": list(options.sources)}
    if options.hf or options.mds:
        if len(options.sources) != 1:
            flag = "--hf" if options.hf else "--mds"
            raise ConfigError(f"{flag} takes one SOURCE, and {len(options.sources)} were given")
        key = "hf_name" if options.hf else "local"
        location = {key: options.sources[0], "split": options.split}
    elif options.split is not None:
        raise ConfigError(
            f"--split is {options.split!r}, which has no effect on files; "
            "leave it out, it is for --hf and --mds"
        )
    return parse(Source, location | {"text_key": options.text_key})


def _check_apart(options: PackOptions) -> None:
    """Raise ConfigError if the output would be among the files of a source, or the other way."""
    out = real_path(options.out)
    for name in options.sources:
        source = real_path(name)
        if source.exists() and (source == out or source in out.parents or out in source.parents):
            raise ConfigError(
                f"OUT is {str(options.out)!r} and SOURCE {name!r}, one inside the other; "
                "give an output folder apart from the text"
            )


def _progress_bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        TransferSpeedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    return Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
