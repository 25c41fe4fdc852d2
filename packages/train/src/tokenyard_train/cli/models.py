"""The commands for models that stand on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")]
Precision = Annotated[
    str | None,
    typer.Option(help="fp32 or amp_bf16; default: that of the training, or of a folder's weights."),
]


@app.command()
def generate(
    model: Annotated[
        Path, typer.Argument(help="The folder of a run, a checkpoint, or a Hugging Face folder.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text to continue; several go together.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0)] = 17,
    tokenizer: Annotated[
        str | None, typer.Option(help="A name or path in place of the model's own.")
    ] = None,
    device: Device = "auto",
    precision: Precision = None,
) -> None:
    """Continue prompts with a trained model."""
    from tokenyard_train.commands.generate import generate as continuations

    prompts = prompt or [""]
    texts = continuations(
        model, prompts, max_new_tokens, temperature, seed, tokenizer, device, precision
    )
    for prompt_text, text in zip(prompts, texts):
        print(prompt_text + text)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="The folder of a run, a checkpoint, or a Hugging Face folder.")
    ],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    to: Annotated[str, typer.Option(help="hf, tokenyard or megablocks")] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="Of hf's weights: float32, bfloat16 or float16.")
    ] = None,
    fused: Annotated[
        bool, typer.Option("--fused", help="One tensor for all experts of a layer.")
    ] = False,
    like: Annotated[
        Path | None, typer.Option(help="A folder whose tokenizer and token ids go along.")
    ] = None,
) -> None:
    """Write a model in another form."""
    from tokenyard_train.commands.convert import convert as run

    run(source, target, to, dtype, fused, like)


@app.command()
def upcycle(
    source: Annotated[
        Path,
        typer.Argument(help="The Hugging Face folder of a dense model: llama, mistral or qwen3."),
    ],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    num_experts: Annotated[int, typer.Option(min=1, help="Experts of a layer.")],
    top_k: Annotated[int, typer.Option(min=1, help="Experts of a token.")],
    granularity: Annotated[
        int,
        typer.Option(
            min=1,
            help="Slices of a layer, an expert each; 1 copies it, as many as experts split it.",
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the routers.")] = 17,
) -> None:
    """Make a model with experts of a dense one: each expert is a copy, or a slice, of the feed-forward layer."""
    from tokenyard_train.commands.upcycle import upcycle as run

    run(source, target, num_experts, top_k, granularity, seed, Console())


@app.command()
def routing(
    model: Annotated[
        Path, typer.Argument(help="The folder of a run, a checkpoint, or a Hugging Face folder.")
    ],
    data: Annotated[
        Path,
        typer.Option(help="A file of text (.txt, .jsonl, .parquet, ...), or a folder of .txt."),
    ],
    tokens: Annotated[int, typer.Option(min=1, help="How many to route at most.")] = 1 << 17,
    text_key: Annotated[str, typer.Option(help="The column of .jsonl and .parquet.")] = "text",
    tokenizer: Annotated[
        str | None, typer.Option(help="A name or path in place of the model's own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where routing.json and routing.png go.")] = Path(
        "routing"
    ),
    device: Device = "auto",
    precision: Precision = None,
) -> None:
    """Tell how a model routes a text: each layer's load, dead experts, and which experts go together."""
    from tokenyard_train.commands.routing import report

    report(model, data, tokens, text_key, tokenizer, out, Console(), device, precision)
