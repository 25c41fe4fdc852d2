"""The options of the commands, shared by the command line and the functions.

This module must not import torch, so that ``--help`` is fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="Folder of a run or a checkpoint, or one of Hugging Face or PEFT, "
        "or models:/NAME/VERSION of MLflow.",
    ),
]
Target = Annotated[Path, typer.Argument(metavar="TARGET", help="Output folder. It must not exist.")]
Tokenizer = Annotated[
    str | None, typer.Option(help="Tokenizer name or path. Default: the model's.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")]
Precision = Annotated[
    str | None,
    typer.Option(
        help=(
            "fp32, amp_bf16 or bf16_master. "
            "Default: the precision of training, or a folder's weight dtype."
        )
    ),
]

Base = Annotated[
    Path | None,
    typer.Option(help="Folder of the base that the model's adapters are for. Default: as trained."),
]


@dataclass(frozen=True)
class InitOptions:
    """The arguments and options of `tokenyard init`."""

    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="YAML file to write. It must not exist.")
    ] = Path("config.yaml")
    model: Annotated[
        str | None,
        typer.Option(help="quickstart (default), dbrx, mixtral, olmoe or qwen3_moe."),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(help="Text, or with --finetune conversations. Default: Python's own source."),
    ] = None
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Fine-tune --base on conversations, with LoRA.")
    ] = False
    base: Annotated[
        str | None, typer.Option(help="Hugging Face folder of the model to --finetune.")
    ] = None


@dataclass(frozen=True)
class GenerateOptions:
    """The arguments and options of `tokenyard generate`."""

    model: Model
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue. Repeat for a batch of prompts.")
    ] = None
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=2**31, help="Maximum tokens per prompt.")
    ] = 200
    temperature: Annotated[
        float,
        typer.Option(min=0, max=1e4, help="Sampling temperature. 0 takes the most likely token."),
    ] = 0.8
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 17
    tokenizer: Tokenizer = None
    device: Device = "auto"
    precision: Precision = None
    base: Base = None
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Answer in the chat template: each --prompt, or standard input. On a terminal, "
            "answer one line after another.",
        ),
    ] = False
    system: Annotated[
        str | None, typer.Option(help="System message of --chat, such as 'Be brief.'")
    ] = None
    chat_template: Annotated[
        Path | None,
        typer.Option(help="Jinja file of --chat. Default: that of the training, or the folder's."),
    ] = None

    @property
    def prompts(self) -> list[str]:
        """The prompts, by default an empty one."""
        return self.prompt or [""]


@dataclass(frozen=True)
class ConvertOptions:
    """The arguments and options of `tokenyard convert`."""

    source: Model
    target: Target
    to: Annotated[str, typer.Option(help="Output format: hf, tokenyard, megablocks or peft.")] = (
        "hf"
    )
    dtype: Annotated[
        str | None, typer.Option(help="Output weight dtype: float32, bfloat16 or float16.")
    ] = None
    fused: Annotated[
        bool, typer.Option("--fused", help="Write one tensor for all experts of a layer.")
    ] = False
    like: Annotated[
        Path | None,
        typer.Option(help="Folder to copy the tokenizer and the token ids from."),
    ] = None
    tokenizer: Tokenizer = None
    base: Base = None


@dataclass(frozen=True)
class UpcycleOptions:
    """The arguments and options of `tokenyard upcycle`."""

    source: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="Hugging Face folder of a dense model: llama, mistral or qwen3."
        ),
    ]
    target: Target
    num_experts: Annotated[int, typer.Option(min=1, max=1 << 20, help="Experts per layer.")]
    top_k: Annotated[int, typer.Option(min=1, max=1 << 20, help="Experts per token.")]
    granularity: Annotated[
        int,
        typer.Option(
            min=1,
            help="Split each dense FFN into this many experts (1: every expert is a full copy).",
        ),
    ] = 1
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the router weights.")] = (
        17
    )


@dataclass(frozen=True)
class RoutingOptions:
    """The arguments and options of `tokenyard routing`."""

    model: Model
    data: Annotated[
        Path,
        typer.Option(help="Text file (.txt, .jsonl, .parquet, ...), or a folder of .txt files."),
    ]
    tokens: Annotated[int, typer.Option(min=1, max=1 << 40, help="Maximum tokens to route.")] = (
        1 << 17
    )
    text_key: Annotated[
        str, typer.Option(help="Column that holds the text of .jsonl and .parquet.")
    ] = "text"
    tokenizer: Tokenizer = None
    out: Annotated[Path, typer.Option(help="Output folder of routing.json and routing.png.")] = (
        Path("routing")
    )
    device: Device = "auto"
    precision: Precision = None
    base: Base = None


@dataclass(frozen=True)
class EvalOptions:
    """The arguments and options of `tokenyard eval`."""

    model: Model
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Task of lm-eval, such as arc_easy, or a YAML file. Repeat, or use ','."),
    ] = None
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Text file or folder to compute the perplexity of. Repeat for several."),
    ] = None
    text_key: Annotated[
        str, typer.Option(help="Column that holds the text of .jsonl and .parquet.")
    ] = "text"
    chat: Annotated[
        bool, typer.Option("--chat", help="Render the questions of --tasks in the chat template.")
    ] = False
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question. Default: the task's.")
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum documents per task. Default: all.")
    ] = None
    batch_size: Annotated[
        int, typer.Option(min=1, max=1 << 16, help="Maximum samples per forward pass.")
    ] = 8
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of examples and sampling.")] = 17
    tokenizer: Tokenizer = None
    out: Annotated[Path, typer.Option(help="Output folder of eval.json.")] = Path("eval")
    device: Device = "auto"
    precision: Precision = None
    base: Base = None


_Tokenizer = Annotated[
    str, typer.Option(help="bytes, a tokenizer.json or its folder, or tiktoken:<encoding>.")
]
_EosToken = Annotated[
    str | None, typer.Option(help="End-of-document token of a tokenizer.json, such as '</s>'.")
]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Delete the packed folder at OUT first.")
]


@dataclass(frozen=True)
class PackOptions:
    """The arguments and options of `tokenyard data pack`."""

    out: Annotated[Path, typer.Argument(help="Output folder. An interrupted pack is resumed.")]
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files and folders of text, .jsonl (.gz, .zst) or .parquet. "
            "With --hf, --mds or --delta: one name or folder."
        ),
    ]
    tokenizer: _Tokenizer = "bytes"
    eos_token: _EosToken = None
    hf: Annotated[bool, typer.Option("--hf", help="SOURCE is a Hugging Face dataset.")] = False
    delta: Annotated[bool, typer.Option("--delta", help="SOURCE is a Delta table.")] = False
    table_version: Annotated[
        int | None,
        typer.Option(min=0, help="Version of the --delta table. Default: the newest."),
    ] = None
    mds: Annotated[bool, typer.Option("--mds", help="SOURCE is a folder of MDS shards.")] = False
    split: Annotated[
        str | None, typer.Option(help="Split of --hf (default: train), or subfolder of --mds.")
    ] = None
    text_key: Annotated[str, typer.Option(help="Column that holds the text.")] = "text"
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Worker processes. Default: all cores.")
    ] = None
    overwrite: _Overwrite = False


@dataclass(frozen=True)
class SparkPackOptions:
    """The arguments and options of `tokenyard data spark`."""

    out: Annotated[
        Path, typer.Argument(help="Output folder, which the driver and all executors share.")
    ]
    source: Annotated[str, typer.Argument(help="Table name. With --format: a path of files.")]
    order: Annotated[
        list[str],
        typer.Option(help="Column that sorts the rows. Repeat it until each row is unique."),
    ]
    format: Annotated[
        str | None, typer.Option(help="Format of the files, such as parquet, json or delta.")
    ] = None
    text_key: Annotated[str, typer.Option(help="Column that holds the text.")] = "text"
    tokenizer: _Tokenizer = "bytes"
    eos_token: _EosToken = None
    overwrite: _Overwrite = False
