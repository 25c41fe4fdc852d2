"""The progress of a run: a bar on a terminal, some lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tokenyard_train.engine.setup import Run

_LINES = 20  # in a whole run, where there is no terminal


class Progress:
    """Shows loss, speed and balance while a run goes on."""

    def __init__(self, run: Run):
        self.run = run
        self.every = max(1, run.span(run.config.console_log_interval), run.batches // _LINES)
        self.bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=run.console,
            disable=not run.console.is_terminal,
        )
        self.task = self.bar.add_task(
            run.config.run_name, total=run.batches, completed=run.batch, state=""
        )

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def update(self, record: dict[str, Any]) -> None:
        """Show the record of a step."""
        state = describe(record)
        self.bar.update(self.task, completed=record["batch"], state=state)
        last = record["batch"] == self.run.batches
        if not self.run.console.is_terminal and (last or record["batch"] % self.every == 0):
            self.run.console.print(
                f"batch {record['batch']}/{self.run.batches}: {state}", highlight=False
            )

    def skipped(self, record: dict[str, Any]) -> None:
        """Show that a step was not taken."""
        text = f"batch {record['batch']} was skipped: loss {record['loss']}, gradient norm {record['grad_norm']}"
        self.bar.update(self.task, completed=record["batch"])
        self.run.console.print(text, highlight=False)

    def evaluated(self, record: dict[str, Any]) -> None:
        """Show the record of an evaluation."""
        loss = f"{record['loss']:.4f}, {record['bits_per_byte']:.3f} bits per byte"
        text = f"batch {record['batch']}: held-out loss {loss}"
        self.run.console.print(text, highlight=False)


def describe(record: dict[str, Any]) -> str:
    """Return loss and speed, and of the worst layer the busiest expert (a multiple of the mean) and the entropy."""
    text = f"loss {record['loss']:.3f}  {record['tokens_per_s']:,} tokens/s  {record['flops_per_s'] / 1e9:.1f} GFLOP/s"
    if not record["routing"]:
        return text
    busiest = max(layer["busiest"] for layer in record["routing"])
    entropy = min(layer["entropy"] for layer in record["routing"])
    return f"{text}  busiest expert {busiest:.2f}x  entropy {entropy:.3f}"
