"""What the subcommands of `tokenyard data` do."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from tokenyard import ConfigError
from tokenyard_models.schema import parse
from tokenyard_train.data.packing import JOURNAL, Counts, pack
from tokenyard_train.data.schema import Source, Tokenizer
from tokenyard_train.data.sources import describe_source, read_documents
from tokenyard_train.data.tokens import (
    DOCUMENTS,
    HASHES,
    MANIFEST,
    TOKENS,
    TokenFile,
    read_manifest,
)


def run_pack(
    console: Console,
    out: Path,
    sources: Sequence[str],
    tokenizer: str,
    eos_token: str | None,
    hf: bool,
    mds: bool,
    split: str | None,
    text_key: str,
    workers: int | None,
    overwrite: bool,
) -> None:
    """Pack sources into a folder, with a bar. Raises ConfigError for what cannot be read."""
    source = _source(sources, hf, mds, split, text_key)
    if overwrite:
        _clear(out)
    began = time.monotonic()
    with _bar(console) as bar:
        task = bar.add_task("packing", total=None, state="")

        def show(done: Counts) -> None:
            state = f"{done.documents:,} documents, {done.tokens:,} tokens"
            bar.update(task, completed=done.text_bytes, state=state)

        done = pack(
            out,
            lambda: read_documents(source, "SOURCE"),
            parse_tokenizer(tokenizer, eos_token),
            describe_source(source, "SOURCE"),
            workers or os.cpu_count() or 1,
            show,
        )
    seconds = time.monotonic() - began
    console.print(
        f"{out}: {done.documents:,} documents, {done.tokens:,} tokens of {done.text_bytes / 1e6:,.1f} MB of text "
        f"in {seconds:.1f} s",
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


def parse_tokenizer(text: str, eos_token: str | None) -> Tokenizer:
    """Return the tokenizer config of an option: a name or path, or ``tiktoken:<encoding>``."""
    name, _, encoding = text.partition(":")
    if name == "tiktoken":
        return parse(Tokenizer, {"name": "tiktoken", "kwargs": {"encoding_name": encoding or None}})
    return parse(Tokenizer, {"name": text, "eos_token": eos_token})


def _source(
    sources: Sequence[str], hf: bool, mds: bool, split: str | None, text_key: str
) -> Source:
    if hf and mds:
        raise ConfigError("--hf and --mds were given; a source is one of them")
    place: dict[str, Any] = {"path": list(sources)}
    if hf or mds:
        if len(sources) != 1:
            raise ConfigError(
                f"--{'hf' if hf else 'mds'} takes one SOURCE, and {len(sources)} were given"
            )
        place = {"hf_name" if hf else "local": sources[0], "split": split}
    return parse(Source, place | {"text_key": text_key})


def _clear(out: Path) -> None:
    """Delete a packing, and nothing else."""
    ours = {MANIFEST, TOKENS, DOCUMENTS, HASHES, JOURNAL, MANIFEST + ".unfinished"}
    others = sorted(path.name for path in out.glob("*") if path.name not in ours)
    if others:
        raise ConfigError(
            f"--overwrite deletes a packed folder, and {str(out)!r} holds something else: {others[0]}"
        )
    shutil.rmtree(out, ignore_errors=True)


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        TransferSpeedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    return Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
