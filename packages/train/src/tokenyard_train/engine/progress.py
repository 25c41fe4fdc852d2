"""Progress of a run on the console: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tokenyard_train.engine.state import Run

_LINES = 20  # of a whole run, without a terminal


class Progress:
    """Shows the records of a run. A context manager."""

    def __init__(self, run: Run):
        setup = run.setup
        self.console = setup.console
        self.batches = setup.batches
        self.every = max(
            1, setup.steps_in(setup.config.console_log_interval), self.batches // _LINES
        )
        self.bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task(
            setup.config.run_name, total=self.batches, completed=run.batch, state=""
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

    def show(self, record: dict[str, Any]) -> None:
        """Show the record of a step, of a skipped step or of an evaluation."""
        batch = record["batch"]
        match record["kind"]:
            case "train":
                self._trained(batch, describe(record))
            case "skipped":
                self.bar.update(self.task, completed=batch)
                numbers = f"loss {record['loss']}, gradient norm {record['grad_norm']}"
                self.console.print(f"batch {batch} was skipped: {numbers}", highlight=False)
            case kind if kind.startswith("eval"):
                loss = f"{record['loss']:.4f}, {record['bits_per_byte']:.3f} bits per byte"
                of = kind.removeprefix("eval/") + " " if "/" in kind else ""
                self.console.print(f"batch {batch}: {of}held-out loss {loss}", highlight=False)

    def _trained(self, batch: int, state: str) -> None:
        self.bar.update(self.task, completed=batch, state=state)
        shown = batch == self.batches or batch % self.every == 0
        if shown and not self.console.is_terminal:
            self.console.print(f"batch {batch}/{self.batches}: {state}", highlight=False)


def describe(record: dict[str, Any]) -> str:
    """Return loss and speed, and the highest load and the lowest entropy of any layer.

    The load is a multiple of the mean.
    """
    speed = f"{record['tokens_per_s']:,} tokens/s  {record['flops_per_s'] / 1e9:.1f} GFLOP/s"
    text = f"loss {record['loss']:.3f}  {speed}"
    if not record["routing"]:
        return text
    busiest = max(layer["busiest"] for layer in record["routing"])
    entropy = min(layer["entropy"] for layer in record["routing"])
    return f"{text}  busiest expert {busiest:.2f}x  entropy {entropy:.3f}"
