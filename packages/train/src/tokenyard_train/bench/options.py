"""Options of `tokenyard bench train` and `tokenyard bench generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Which config to measure, and beside which peers."""

    config: Annotated[Path, Argument(help="YAML config.")]
    overrides: Annotated[
        list[str], Argument(help="key=value overrides, such as optimizer.lr=1e-3.")
    ] = field(default_factory=list)
    peers: Annotated[
        str,
        Option(
            help="none, both (transformers' own two), or names separated by commas: "
            "transformers-eager, transformers-grouped_mm, transformers-tokenyard."
        ),
    ] = "none"
    peer_dtype: Annotated[
        str, Option(help="Dtype of the peers' weights: fp32 (as ours) or bf16.")
    ] = "fp32"
    apart: Annotated[
        bool,
        Option(
            "--apart",
            help="Train one after another instead of in turns, if they do not fit together.",
        ),
    ] = False
    variants: Annotated[
        list[str],
        Option(
            "--variant",
            help="key=value of a second model of ours, which trains in turns with the first, such "
            "as 'backends.experts={name: gluon, precision: fp8}'. Repeatable.",
        ),
    ] = field(default_factory=list)
    steps: Annotated[int, Option(min=3, help="Measured steps.")] = 20
    threads: Annotated[int | None, Option(min=1, help="CPU threads. Default: torch's.")] = None
    out: Annotated[Path, Option(help="Output folder.")] = Path("bench")


@dataclass(frozen=True, kw_only=True)
class BenchGenerateOptions:
    """Which config generates, how much, and beside which peers."""

    config: Annotated[Path, Argument(help="YAML config.")]
    overrides: Annotated[
        list[str], Argument(help="key=value overrides, such as model.num_hidden_layers=8.")
    ] = field(default_factory=list)
    peers: Annotated[
        str,
        Option(
            help="none, or names separated by commas: transformers-eager, "
            "transformers-grouped_mm, transformers-tokenyard; with -compiled at the end they are "
            "compiled, with a static cache, on a GPU."
        ),
    ] = "none"
    peer_limit: Annotated[
        float | None,
        Option(
            min=1,
            max=86_400,
            help="Seconds that a peer may take for each number of prompts, with its compilation, "
            "such as 60. After that its row says so. Default: no limit.",
        ),
    ] = None
    batch: Annotated[list[int], Option("--batch", min=1, help="Prompts at a time. Repeatable.")] = (
        field(default_factory=lambda: [1, 16])
    )
    prompt_tokens: Annotated[int, Option(min=1, help="Tokens of each prompt.")] = 128
    new_tokens: Annotated[int, Option(min=16, help="Tokens of each continuation.")] = 128
    threads: Annotated[int | None, Option(min=1, help="CPU threads. Default: torch's.")] = None
    out: Annotated[Path, Option(help="Output folder.")] = Path("bench")
