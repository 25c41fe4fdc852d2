"""The options of `tokenyard data pack`.

A module of its own, because the command line reads it and must not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True)
class PackOptions:
    """The arguments and options of `tokenyard data pack`."""

    out: Annotated[Path, typer.Argument(help="Output folder. An interrupted pack is resumed.")]
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files and folders of text, .jsonl (.gz, .zst) or .parquet. "
            "With --hf or --mds: one name or folder."
        ),
    ]
    tokenizer: Annotated[
        str, typer.Option(help="bytes, a tokenizer.json or its folder, or tiktoken:<encoding>.")
    ] = "bytes"
    eos_token: Annotated[
        str | None,
        typer.Option(help="End-of-document token of a tokenizer.json, such as '</s>'."),
    ] = None
    hf: Annotated[bool, typer.Option("--hf", help="SOURCE is a Hugging Face dataset.")] = False
    mds: Annotated[bool, typer.Option("--mds", help="SOURCE is a folder of MDS shards.")] = False
    split: Annotated[
        str | None, typer.Option(help="Split of --hf (default: train), or subfolder of --mds.")
    ] = None
    text_key: Annotated[str, typer.Option(help="Column that holds the text.")] = "text"
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes. Default: all cores.")
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the packed folder at OUT first.")
    ] = False
