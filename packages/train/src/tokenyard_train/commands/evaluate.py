"""Evaluate a model on text files (perplexity) and on tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenyard import ConfigError, started_processes
from tokenyard_cli.console import print_line
from tokenyard_cli.results import write_results
from tokenyard_train.commands.chat import required_template
from tokenyard_train.commands.load_model import load_trained
from tokenyard_train.commands.options import EvalOptions
from tokenyard_train.commands.perplexity import perplexity
from tokenyard_train.optional import require

Records = list[dict[str, Any]]


def evaluate(options: EvalOptions, console: Console) -> Records:
    """Evaluate a model; print tables, write eval.json, and return its records.

    Raises TokenyardError, before the model is loaded if lm-eval is needed and missing.
    """
    if not options.tasks and not options.data:
        raise ConfigError("there is nothing to evaluate; give --tasks, --data or both")
    if started_processes() > 1:
        raise ConfigError(
            f"eval runs on one rank, and {started_processes()} were started; start it without a "
            "launcher, or unset WORLD_SIZE if no launcher set it"
        )
    if options.tasks:
        require("lm_eval", "--tasks", "tokenyard-train[eval]")
    loaded = load_trained(options.model, options.device, options.precision, options.base)
    loaded = loaded.with_tokenizer(options.tokenizer)
    tokenizer = loaded.build_tokenizer()
    texts = [
        perplexity(loaded, tokenizer, path, options.text_key, options.batch_size)
        for path in options.data or []
    ]
    tasks: Records = []
    if options.tasks:
        from tokenyard_train.commands.harness_model import build_harness_model
        from tokenyard_train.commands.harness_tasks import run_tasks

        template = required_template(loaded, None, options.model) if options.chat else None
        model = build_harness_model(loaded, tokenizer, options.batch_size, template)
        tasks = run_tasks(model, options)
    _print_texts(texts, console)
    _print_tasks(tasks, console)
    content = {"kind": "eval", "model": str(options.model), "records": texts + tasks}
    path = write_results(options.out, "eval", content)
    print_line(console, f"wrote {path}")
    return texts + tasks


def _print_texts(records: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table("text", "tokens", "nats/token", "perplexity", "bits/byte")
    for record in records:
        bits = record["bits_per_byte"]
        table.add_row(
            record["data"],
            f"{record['tokens']:,}",
            f"{record['loss']:.4f}",
            f"{record['perplexity']:.4g}",
            "" if bits is None else f"{bits:.4f}",
        )
    if records:
        console.print(table)


def _print_tasks(records: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table("task", "shots", "metric", "value", "± stderr")
    for record in records:
        name = record["filter"]
        metric = record["metric"] if name == "none" else f"{record['metric']} ({name})"
        value = record["value"]
        table.add_row(
            record["task"],
            str(record["shots"]),
            metric,
            f"{value:.4f}" if isinstance(value, float) else str(value),
            "" if record["stderr"] is None else f"{record['stderr']:.4f}",
        )
    if records:
        console.print(table)
