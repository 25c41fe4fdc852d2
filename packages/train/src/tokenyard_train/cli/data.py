"""`tokenyard data`: packing text, and looking at what was packed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="data", no_args_is_help=True, help="Pack text into token files, and check them."
)

Folder = Annotated[Path, typer.Argument(help="A packed folder.")]


@app.command()
def pack(
    out: Annotated[
        Path, typer.Argument(help="The folder to write; one that was begun is gone on with.")
    ],
    sources: Annotated[
        list[str],
        typer.Argument(help="Files and folders: text, .jsonl (.gz, .zst), .parquet; or one name."),
    ],
    tokenizer: Annotated[
        str, typer.Option(help="bytes, a tokenizer.json or its folder, or tiktoken:<encoding>.")
    ] = "bytes",
    eos_token: Annotated[
        str | None, typer.Option(help="What ends a document, for a tokenizer.json.")
    ] = None,
    hf: Annotated[
        bool, typer.Option("--hf", help="SOURCE is a dataset of Hugging Face's.")
    ] = False,
    mds: Annotated[bool, typer.Option("--mds", help="SOURCE is a folder of MDS shards.")] = False,
    split: Annotated[str | None, typer.Option(help="Of --hf or --mds.")] = None,
    text_key: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; all cores otherwise.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what stands in the folder.")
    ] = False,
) -> None:
    """Tokenize text into a memory-mapped, checksummed folder; killed and run again, it goes on where it was."""
    from tokenyard_train.data.commands import run_pack

    run_pack(
        Console(), out, sources, tokenizer, eos_token, hf, mds, split, text_key, workers, overwrite
    )


@app.command()
def verify(folder: Folder) -> None:
    """Read a packed folder whole and check every block."""
    from tokenyard_train.data.commands import run_verify

    run_verify(Console(), folder)


@app.command()
def info(folder: Folder) -> None:
    """Print what a packed folder holds."""
    from tokenyard_train.data.commands import run_info

    run_info(Console(), folder)
