"""What a run says before its first step and after its last."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from tokenyard import moe_layers
from tokenyard_models import count_parameters
from tokenyard_train.engine.setup import Run

LAST = 20
"""Steps that a statement about the end of a run averages over."""


def announce(run: Run) -> None:
    """Say what is trained, on what, by which backends, and from where."""
    config, size = run.config, count_parameters(run.model)
    run.console.print(
        f"[bold]{config.model['name']}[/bold]: {size.total:,} parameters, {size.active:,} active; "
        f"{run.batches} batches of {run.batch_tokens:,} tokens on {config.device}, {config.precision}"
    )
    backends = {
        part: c.backend.name for moe in moe_layers(run.model)[:1] for part, c in moe.chosen.items()
    }
    if backends:
        run.console.print(
            "backends: " + ", ".join(f"{part} {name}" for part, name in backends.items())
        )
    if run.batch:
        run.console.print(f"resumed after batch {run.batch} from {run.folder}")


def summarize(run: Run, records: list[dict[str, Any]]) -> None:
    """Print the held-out score beside the baselines, and where the files are."""
    table = Table(
        "held-out text", "bits per byte", title=f"{run.config.run_name} after {run.batch} batches"
    )
    for record in records:
        if record["kind"] == "baselines":
            table.add_row("unigram model", f"{record['unigram']:.3f}")
            table.add_row("bigram model (Witten-Bell)", f"{record['bigram']:.3f}")
    scores = [record["bits_per_byte"] for record in records if record["kind"] == "eval"]
    if scores:
        table.add_row(f"[bold]{run.config.model['name']}[/bold]", f"[bold]{scores[-1]:.3f}[/bold]")
        run.console.print(table)
    if (routing := describe_routing(records)) is not None:
        run.console.print(routing, highlight=False)
    seconds = sum(record["seconds"] for record in records if record["kind"] == "train")
    run.console.print(
        f"trained for {seconds:.0f} s; metrics.jsonl, loss.png, experts.png and checkpoints: {run.folder}"
    )


def describe_routing(records: list[dict[str, Any]]) -> str | None:
    """Say in a line how even the routing of the last steps was, layers averaged; None without experts."""
    layers = [
        layer
        for r in [r for r in records if r["kind"] == "train"][-LAST:]
        for layer in r.get("routing", ())
    ]
    if not layers:
        return None
    mean = {key: sum(layer[key] for layer in layers) / len(layers) for key in layers[0]}
    return (
        f"routing of the last steps: entropy {mean['entropy']:.3f} (1 is uniform), busiest expert "
        f"{mean['busiest']:.2f}x the mean, {mean['idle']:.2g} experts of a layer idle, {mean['dropped']:.1%} dropped"
    )
