"""The text that a run prints before its first step and after its last."""

from __future__ import annotations

import logging
from typing import Any

from rich.table import Table

from tokenyard import count_parameters
from tokenyard.units import counted
from tokenyard_cli.console import print_line
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import Data
from tokenyard_train.distributed import is_rank0
from tokenyard_train.engine.run_length import schedule_warnings
from tokenyard_train.engine.state import Run
from tokenyard_train.engine.table_versions import table_versions
from tokenyard_train.engine.trainable import describe_trainable, trainable

log = logging.getLogger("tokenyard")

LAST = 20
"""Steps over which the summary averages routing."""


def announce(run: Run) -> None:
    """Print the model, the device, the backends and the checkpoint that the run resumed."""
    setup = run.setup
    config = setup.config
    size = count_parameters(setup.model)
    batches = counted(setup.batches, "batch", "batches")
    print_line(
        setup.console,
        f"{config.model['name']}: {size.total:,} parameters, {size.active:,} active; "
        f"{batches} of {setup.batch_tokens:,} tokens on {config.device}, "
        f"{config.precision}; {describe_tokenizer(config, setup.data)}",
    )
    print_line(setup.console, f"training text: {setup.data.train.describe()}")
    for key, table in table_versions(config).items():
        print_line(setup.console, f"{key}: {table}")
    if len(trainable(setup.model)) < len(list(setup.model.parameters())):
        print_line(setup.console, f"trainable: {describe_trainable(setup.model)}")
    if is_rank0():
        for warning in schedule_warnings(config, setup.data):
            log.warning("%s", warning)
    for moe in setup.layers[:1]:  # all layers of a model have the same backends
        names = [f"{part} {chosen.backend.name}" for part, chosen in moe.chosen.items()]
        print_line(setup.console, f"backends: {', '.join(names)}")
    if run.batch:
        print_line(setup.console, f"resumed after batch {run.batch} from {setup.folder}")


def describe_tokenizer(config: TrainConfig, data: Data) -> str:
    """Return the tokenizer's name, its ids, and the rows of the model's vocabulary."""
    ids = data.tokenizer.vocab_size
    rows = config.model["vocab_size"]
    padded = f", vocabulary of the model {rows:,}" if rows != ids else ""
    return f"tokenizer {config.tokenizer.name}, {ids:,} ids{padded}"


def summarize(run: Run, records: list[dict[str, Any]]) -> None:
    """Print the held-out score beside the baselines, the routing, and where the files are."""
    setup = run.setup
    config = setup.config
    title = f"{config.run_name} after {counted(run.batch, 'batch', 'batches')}"
    table = Table("held-out text", "bits per byte", title=title)
    for record in records:
        if record["kind"] == "baselines":
            table.add_row("unigram model", f"{record['unigram']:.3f}")
            table.add_row("bigram model (Witten-Bell)", f"{record['bigram']:.3f}")
    scores = [record["bits_per_byte"] for record in records if record["kind"] == "eval"]
    if scores:
        table.add_row(f"[bold]{config.model['name']}[/bold]", f"[bold]{scores[-1]:.3f}[/bold]")
        setup.console.print(table)
    routing = describe_routing(records)
    if routing is not None:
        print_line(setup.console, routing)
    seconds = sum(record["seconds"] for record in records if record["kind"] == "train")
    print_line(
        setup.console,
        f"trained for {seconds:.0f} s; metrics.jsonl, loss.png, experts.png and checkpoints: "
        f"{setup.folder}",
    )


def describe_routing(records: list[dict[str, Any]]) -> str | None:
    """Return one line on the routing of the last steps, layers averaged; None without experts."""
    steps = [record for record in records if record["kind"] == "train"][-LAST:]
    layers = [layer for step in steps for layer in step.get("routing", ())]
    if not layers:
        return None
    mean = {key: sum(layer[key] for layer in layers) / len(layers) for key in layers[0]}
    return (
        f"routing of the last steps: entropy {mean['entropy']:.3f} (1 is uniform), busiest expert "
        f"{mean['busiest']:.2f}x the mean, on average {mean['idle']:.2g} idle experts per layer, "
        f"{mean['dropped']:.1%} dropped"
    )
