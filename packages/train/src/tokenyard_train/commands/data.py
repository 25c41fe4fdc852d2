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
from tokenyard.units import describe_bytes
from tokenyard_cli.console import print_line
from tokenyard_models.strict_config import parse
from tokenyard_train.commands.options import PackOptions
from tokenyard_train.data.journal import PackProgress, recorded_sources
from tokenyard_train.data.packing import pack
from tokenyard_train.data.paths import UNITY_CATALOG
from tokenyard_train.data.schema import Source, TokenizerConfig
from tokenyard_train.data.sources import describe_source, newest_version, read_documents
from tokenyard_train.data.sources.keys import SOURCE, key_below
from tokenyard_train.data.tokens import TokenFile, read_manifest
from tokenyard_train.data.unused_keys import check_tokenizer

_LOCATIONS = {"--hf": "hf_name", "--mds": "local", "--delta": "delta"}


def run_pack(console: Console, options: PackOptions) -> None:
    """Pack sources into a folder, with a progress bar. Raises ConfigError for unreadable text."""
    source = _source(options)
    _check_apart(options)
    source = _with_version(source, [] if options.overwrite else recorded_sources(options.out))
    if source.delta is not None:
        print_line(console, f"{SOURCE}: {source.delta}, version {source.version}")
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
    print_line(
        console,
        f"{options.out}: {done.documents:,} documents, {done.tokens:,} tokens "
        f"of {describe_bytes(done.text_bytes)} of text in {seconds:.1f} s",
    )


def run_verify(console: Console, folder: Path) -> None:
    """Check every block of a packed folder. Raises CorruptError."""
    tokens = TokenFile(folder)
    tokens.verify()
    print_line(console, f"{folder}: all {len(tokens):,} tokens are as they were packed")


def run_info(console: Console, folder: Path) -> None:
    """Print a packed folder's manifest."""
    manifest = read_manifest(folder)
    for key in ("tokens", "documents", "text_bytes", "vocab_size"):
        print_line(console, f"{key.replace('_', ' '):<12} {manifest[key]:,}")
    for key in ("dtype", "tokenizer"):
        print_line(console, f"{key:<12} {manifest[key]}")
    for source in manifest["sources"]:
        print_line(console, f"source       {source.get('file', source)}")


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
    kinds = {"--hf": options.hf, "--mds": options.mds, "--delta": options.delta}
    flags = [flag for flag, given in kinds.items() if given]
    if len(flags) > 1:
        raise ConfigError(f"{' and '.join(flags)} were given; a source is one of them")
    location: dict[str, Any] = {"path": list(options.sources)}
    for name in options.sources:
        if not flags and name.startswith(UNITY_CATALOG):
            raise ConfigError(f"SOURCE {name!r} is a table of Unity Catalog; add --delta")
    if flags:
        if len(options.sources) != 1:
            raise ConfigError(f"{flags[0]} takes one SOURCE, and {len(options.sources)} were given")
        location = {_LOCATIONS[flags[0]]: options.sources[0]}
    for option, value, users in (
        ("split", options.split, ("--hf", "--mds")),
        ("version", options.table_version, ("--delta",)),
    ):
        if value is not None and not set(flags) & set(users):
            raise ConfigError(
                f"{key_below(SOURCE, option)} is {value!r}, which has no effect on "
                f"{'a source of ' + flags[0] if flags else 'files'}; "
                f"leave it out, it is for {' and '.join(users)}"
            )
        location[option] = value
    return parse(Source, location | {"text_key": options.text_key})


def _with_version(source: Source, unfinished: list[dict[str, Any]]) -> Source:
    """Return a source whose Delta table has a version: of an unfinished packing, or the newest."""
    if source.delta is None or source.version is not None:
        return source
    for recorded in unfinished:
        if recorded.get("delta") == source.delta and type(recorded.get("version")) is int:
            return source.model_copy(update={"version": recorded["version"]})
    return source.model_copy(update={"version": newest_version(source, SOURCE)})


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
