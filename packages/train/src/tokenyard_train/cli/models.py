"""The commands for saved models."""

from __future__ import annotations

import sys

from rich.console import Console

from tokenyard_cli import dataclass_options
from tokenyard_cli.guide import guide
from tokenyard_train.commands.options import (
    ConvertOptions,
    EvalOptions,
    GenerateOptions,
    RoutingOptions,
    UpcycleOptions,
)


@guide('tokenyard generate runs/quickstart --prompt "def "', "evaluate.md")
@dataclass_options
def generate(options: GenerateOptions) -> None:
    """Continue prompts with a trained model, or answer them with --chat."""
    if options.chat:
        from tokenyard_train.commands.chat import run_chat

        run_chat(options, sys.stdin, print)
        return
    from tokenyard_train.commands.generate import generate as run

    for prompt, text in zip(options.prompts, run(options)):
        print(prompt + text)


@guide("tokenyard eval runs/quickstart --data held-out.txt --tasks arc_easy", "evaluate.md")
@dataclass_options
def evaluate(options: EvalOptions) -> None:
    """Evaluate a model on text files (perplexity) and on tasks of lm-eval."""
    from tokenyard_train.commands.evaluate import evaluate as run

    run(options, Console())


@guide("tokenyard convert runs/quickstart exported --dtype bfloat16", "evaluate.md")
@dataclass_options
def convert(options: ConvertOptions) -> None:
    """Write a model in another format."""
    from tokenyard_train.commands.convert import convert as run

    run(options, Console())


@guide("tokenyard upcycle llama llama-moe --num-experts 8 --top-k 2", "models.md")
@dataclass_options
def upcycle(options: UpcycleOptions) -> None:
    """Turn a dense model into an MoE model. Each expert is a copy or a slice of the dense FFN."""
    from tokenyard_train.commands.upcycle import upcycle as run

    run(options, Console())


@guide("tokenyard routing runs/quickstart --data text.txt", "evaluate.md")
@dataclass_options
def routing(options: RoutingOptions) -> None:
    """Report how a model routes a text: load per layer, dead experts, and pairs of experts."""
    from tokenyard_train.commands.routing import report

    report(options, Console())
