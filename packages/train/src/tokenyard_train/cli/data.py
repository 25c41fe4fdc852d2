"""`tokenyard data`: pack text into token files, and check packed folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="data", no_args_is_help=True, help="Pack text into token files, and check them."
)

Folder = Annotated[Path, typer.Argument(help="Packed folder.")]


@app.command()
def pack(
    out: Annotated[Path, typer.Argument(help="Output folder. An interrupted pack is resumed.")],
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files and folders of text, .jsonl (.gz, .zst) or .parquet. "
            "With --hf or --mds: one name or folder."
        ),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(help="bytes, a tokenizer.json or its folder, or tiktoken:<encoding>."),
    ] = "bytes",
    eos_token: Annotated[
        str | None,
        typer.Option(help="End-of-document token of a tokenizer.json, such as '</s>'."),
    ] = None,
    hf: Annotated[bool, typer.Option("--hf", help="SOURCE is a Hugging Face dataset.")] = False,
    mds: Annotated[bool, typer.Option("--mds", help="SOURCE is a folder of MDS shards.")] = False,
    split: Annotated[
        str | None, typer.Option(help="Split of --hf (default: train), or subfolder of --mds.")
    ] = None,
    text_key: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes. Default: all cores.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the packed folder at OUT first.")
    ] = False,
) -> None:
    """Pack text into token files. Resumes an interrupted run."""
    from tokenyard_train.commands.data import PackOptions, run_pack

    options = PackOptions(
        out, sources, tokenizer, eos_token, hf, mds, split, text_key, workers, overwrite
    )
    run_pack(Console(), options)


@app.command()
def verify(folder: Folder) -> None:
    """Check every block of a packed folder."""
    from tokenyard_train.commands.data import run_verify

    run_verify(Console(), folder)


@app.command()
def info(folder: Folder) -> None:
    """Print the manifest of a packed folder."""
    from tokenyard_train.commands.data import run_info

    run_info(Console(), folder)
